# The cases of the KVM lab, run inside it: cases NAME...
# A case is the boot of a kernel (bzimage-CPUS, vmlinux-CPUS), one that reboots in between (reboot-CPUS) or copies on a disk
# (disk-CPUS), or a test program.
cd /lab || exit
export RUSE_NEED_KVM=1 RUSE_MOVES=100

# boot KERNEL CPUS [WORDS]. A quiet console: each exit of the guest costs a lot here.
boot() {
    timeout 300 ./ruse run --accel kvm --kernel "$1" --initrd guest.cpio.gz --memory 256M --cpus "$2" \
        --cmdline "console=ttyS0 quiet panic=-1 bench=none $3"
}

# Waits until the guest has come up so many times; false if it ends before.
await() {
    until [ "$(grep -c GUEST-DONE /tmp/log)" = "$1" ]; do
        sleep 1
        kill -0 $guest || return
    done
    sleep 2
}

# Its shell is told to reboot, and the next one to power off.
reboot() {
    mkfifo /tmp/keys
    boot vmlinux "$1" shell < /tmp/keys > /tmp/log &
    guest=$!
    exec 3> /tmp/keys
    await 1 && echo '/bin/busybox reboot -f' >&3 && await 2 && echo '/bin/busybox poweroff -f' >&3 && wait $guest
    status=$?
    cat /tmp/log
    return $status
}

# The default guest copies the first half of a disk to the second.
disk() {
    head -c 2097152 /dev/urandom > /tmp/half
    cat /tmp/half /tmp/half > /tmp/expected
    { cat /tmp/half; head -c 2097152 /dev/zero; } > /tmp/disk
    script=$(echo 'dd if=/dev/vda of=/dev/vda bs=64k count=32 seek=32 conv=notrunc,fsync; echo GUEST-UP cpus=$(nproc)' | base64 -w 0)
    timeout 300 ./ruse run --accel kvm --kernel vmlinux --initrd default.cpio --memory 256M --cpus "$1" \
        --disk /tmp/disk --cmdline "console=ttyS0 quiet panic=-1 ruse.run=$script" && cmp /tmp/disk /tmp/expected
}

# QEMU 7 does not intercept XSETBV, so that KVM does not learn of it.
run_tests() {
    timeout 300 "tests/$1" --nocapture --skip components_that_the_guest_enables
}

for name; do
    echo "LAB-BEGIN $name"
    case $name in
        bzimage-* | vmlinux-*) boot "${name%-*}" "${name#*-}" ;;
        reboot-*) reboot "${name#*-}" ;;
        disk-*) disk "${name#*-}" ;;
        *) run_tests "$name" ;;
    esac < /dev/null
    echo "LAB-END $?"
done
