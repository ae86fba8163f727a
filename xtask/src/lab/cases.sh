# The cases of the KVM lab, run inside it: cases NAME...
# A case is the boot of a kernel (bzimage-CPUS, vmlinux-CPUS) or a test program.
cd /lab || exit
export RUSE_NEED_KVM=1

# A quiet console: each exit of the guest costs a lot here.
boot() {
    timeout 300 ./ruse run --accel kvm --kernel "$1" --initrd guest.cpio.gz --memory 256M --cpus "$2" \
        --cmdline 'console=ttyS0 quiet panic=-1 bench=none'
}

# QEMU 7 does not intercept XSETBV, so that KVM does not learn of it.
run_tests() {
    timeout 300 "tests/$1" --nocapture --skip components_that_the_guest_enables
}

for name; do
    echo "LAB-BEGIN $name"
    case $name in
        bzimage-* | vmlinux-*) boot "${name%-*}" "${name#*-}" ;;
        *) run_tests "$name" ;;
    esac < /dev/null
    echo "LAB-END $?"
done
