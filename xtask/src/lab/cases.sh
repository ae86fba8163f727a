# The cases of the KVM lab, run inside it: cases NAME...
# A case is the boot of a kernel (bzimage-CPUS, vmlinux-CPUS), one that reboots in between (reboot-CPUS) or uses devices
# (disk-CPUS, microvm-CPUS, vhost-CPUS, devices-CPUS), or a test program.
cd /lab || exit
export RUSE_NEED_KVM=1 RUSE_NEED_VHOST=1 RUSE_MOVES=100

# boot KERNEL CPUS [WORDS]. A quiet console: each exit of the guest costs a lot here.
boot() {
    timeout 300 ./ruse run --accel kvm --kernel "$1" --initrd guest.cpio.gz --memory 256M --cpus "$2" \
        --cmdline "console=ttyS0 quiet panic=-1 bench=none $3"
}

# guest CPUS SCRIPT WORDS...: the default guest runs a script.
guest() {
    cpus=$1
    script=$(echo "$2" | base64 -w 0)
    shift 2
    timeout 300 ./ruse run --accel kvm --kernel vmlinux --initrd default.cpio --cpus "$cpus" \
        --cmdline "console=ttyS0 quiet panic=-1 ruse.run=$script" "$@"
}

# Waits until the guest has printed a word so many times; false if it ends before.
await() {
    until [ "$(grep -c "$1" /tmp/log)" = "$2" ]; do
        sleep 1
        kill -0 $guest || return
    done
}

# Its shell is told to reboot, and the next one to power off.
reboot() {
    mkfifo /tmp/keys
    boot vmlinux "$1" shell < /tmp/keys > /tmp/log &
    guest=$!
    exec 3> /tmp/keys
    await GUEST-DONE 1 && sleep 2 && echo '/bin/busybox reboot -f' >&3 &&
        await GUEST-DONE 2 && sleep 2 && echo '/bin/busybox poweroff -f' >&3 && wait $guest
    status=$?
    cat /tmp/log
    return $status
}

# disk CPUS [WORDS...]: the default guest copies the first half of a disk to the second.
disk() {
    cpus=$1
    shift
    head -c 2097152 /dev/urandom > /tmp/half
    cat /tmp/half /tmp/half > /tmp/expected
    { cat /tmp/half; head -c 2097152 /dev/zero; } > /tmp/disk
    guest "$cpus" 'dd if=/dev/vda of=/dev/vda bs=64k count=32 seek=32 conv=notrunc,fsync; echo GUEST-UP cpus=$(nproc)' \
        --memory 256M --disk /tmp/disk "$@" && cmp /tmp/disk /tmp/expected
}

# The kernel serves a network device and sockets of the default guest: files go both ways.
vhost() {
    { tunctl -t t0 && ip addr add 10.9.0.1/24 dev t0 && ip link set t0 up; } || return
    head -c 1048576 /dev/urandom > /tmp/sent
    seq 1 20000 > /tmp/numbers
    nc -l -p 1000 -e md5sum &
    nc -l -p 1001 -e cat /tmp/sent &
    ./vsock echo 1002 1 &
    guest "$1" '
        killall udhcpc; ip addr add 10.9.0.2/24 dev eth0
        echo SENT $(nc 10.9.0.1 1000 < /bin/busybox)
        echo RECEIVED $(nc 10.9.0.1 1001 < /dev/null | md5sum)
        echo ECHOED $(seq 1 20000 | vsock send 2 1002 | md5sum)
        vsock echo 52 1 & echo READY; wait
        echo GUEST-UP cpus=$(nproc)' \
        --memory 256M --net tap=t0,vhost=on --vsock 5,vhost > /tmp/log &
    guest=$!
    await READY 1 && until ./vsock send 5 52 < /tmp/numbers > /tmp/echo; do
        sleep 1
        kill -0 $guest || break
    done
    wait $guest && cmp /tmp/echo /tmp/numbers && printed SENT /bin/busybox && printed RECEIVED /tmp/sent &&
        printed ECHOED /tmp/numbers
    status=$?
    cat /tmp/log
    return $status
}

# Memory of the default guest's: a file in it, more of it and less again, and what it gives back by its balloon. It grows by a
# few blocks at a time: with many at once the guest's kernel complains here that a CPU does nothing else for too long.
devices() {
    head -c 2097152 /dev/urandom > /tmp/pmem
    cp /tmp/pmem /tmp/before
    { head -c 1048576 /bin/busybox; tail -c +1048577 /tmp/pmem; } > /tmp/expected
    guest "$1" '
        total() { awk "/^MemTotal/ { print \$2 }" /proc/meminfo; }
        unused() { awk "/Movable/ { m = 1 } m && /pages free/ { print \$3; exit }" /proc/zoneinfo; }
        pages() { awk "/^balloon_$1/ { print \$2 }" /proc/vmstat; }
        until_is() { is=$1; shift; until [ $("$@") = $is ]; do usleep 100000; done; }
        echo FILE $(md5sum < /dev/pmem0)
        dd if=/bin/busybox of=/dev/pmem0 bs=64k count=16 conv=fsync 2> /dev/null
        first=$(total); echo READY to grow
        until_is $((first + 49152)) total
        before=$(unused)
        cat /bin/busybox /bin/busybox /bin/busybox /bin/busybox > /tmp/large
        [ $((before - $(unused))) -gt 1024 ] && echo USED
        cat /bin/busybox /bin/busybox /bin/busybox /bin/busybox | cmp - /tmp/large && echo SAME
        rm /tmp/large; echo READY to shrink
        until_is $first total; echo READY to inflate
        until_is 4096 pages inflate; until_is 4096 pages deflate
        echo GUEST-UP cpus=$(nproc)' \
        --name m --memory 192M,max=320M --balloon 0 --pmem /tmp/pmem > /tmp/log &
    guest=$!
    await READY 1 && resize memory 208M '208 MiB' && resize memory 224M '224 MiB' && resize memory 240M '240 MiB' &&
        await READY 2 && resize memory 192M '192 MiB' &&
        await READY 3 && resize balloon 16M '16 MiB' && grep 'free-memory: .* MiB' /tmp/said && ./ruse balloon m 0 &&
        wait $guest && printed FILE /tmp/before && grep -q USED /tmp/log && grep -q SAME /tmp/log &&
        cmp /tmp/pmem /tmp/expected
    status=$?
    cat /tmp/log
    return $status
}

# resize memory|balloon SIZE SAID: asks for so much, and waits until there is as much.
resize() {
    ./ruse "$1" m "$2" || return
    until ./ruse "$1" m > /tmp/said && grep -q "^$3 of $3 asked for" /tmp/said; do
        usleep 100000
        kill -0 $guest || return
    done
    echo "$1 $3"
}

# Whether the guest has printed a word and the digest of this file.
printed() {
    grep -q "$1 $(md5sum < "$2" | cut -c -32)" /tmp/log
}

# QEMU 7 does not intercept XSETBV, so that KVM does not learn of it.
run_tests() {
    timeout 300 "tests/$1" --nocapture --skip components_that_the_guest_enables
}

for name; do
    echo "LAB-BEGIN $name"
    # A guest in the background may open its log later than the first look into it.
    : > /tmp/log
    case $name in
        bzimage-* | vmlinux-*) boot "${name%-*}" "${name#*-}" ;;
        reboot-*) reboot "${name#*-}" ;;
        disk-*) disk "${name#*-}" ;;
        microvm-*) disk "${name#*-}" --machine microvm ;;
        vhost-*) vhost "${name#*-}" ;;
        devices-*) devices "${name#*-}" ;;
        *) run_tests "$name" ;;
    esac < /dev/null
    echo "LAB-END $?"
done
