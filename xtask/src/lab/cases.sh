# The cases of the KVM lab, run inside it: cases NAME...
# A case is the boot of a kernel (bzimage-CPUS, vmlinux-CPUS) or a test program.
cd /lab || exit
export RUSE_NEED_KVM=1

# A quiet console: each exit of the guest costs a lot here.
boot() {
    timeout 300 ./ruse run --accel kvm --kernel "$1" --initrd guest.cpio.gz --memory 256M --cpus "$2" \
        --cmdline 'console=ttyS0 quiet panic=-1 bench=none'
}

for name; do
    echo "LAB-BEGIN $name"
    case $name in
        bzimage-* | vmlinux-*) boot "${name%-*}" "${name#*-}" ;;
        *) timeout 300 "tests/$name" --nocapture ;;
    esac < /dev/null
    echo "LAB-END $?"
done
