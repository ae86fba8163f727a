# Runs in the new system: has dpkg install all packages, and sets up what Ruse promises of its images.
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
. /parts/settings
cd /parts/packages

step() { echo "RUSE-STEP $*"; }

# install FLAG...: without a look at the order of dependencies, which the files that are unpacked already make good.
dpkg_all() { dpkg --force-depends --force-confold --force-unsafe-io "$@"; }

# Services of packages are not started here.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates /var/lib/dpkg/triggers
touch /var/lib/dpkg/status /var/lib/dpkg/available

step "installing packages"
# These first, one by one: the scripts of all others rely on them.
for package in base-passwd base-files libc6 perl-base mawk debconf; do
    for file in "$package"_*.deb; do [ ! -e "$file" ] || dpkg_all --install "$file"; done
done
# shellcheck disable=SC2046
dpkg_all --unpack $(cat /parts/all)
dpkg --force-confold --configure -a
rm /usr/sbin/policy-rc.d
# shellcheck disable=SC2012
depmod "$(ls /lib/modules | head -n 1)"

step "setting up the system"
echo "$HOST" > /etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost ip6-loopback\n' "$HOST" > /etc/hosts
echo "LABEL=$LABEL / ext4 defaults,noatime 0 0" > /etc/fstab
cp /parts/sources.list /etc/apt/sources.list
ln -sf /usr/share/zoneinfo/UTC /etc/localtime
echo LANG=C.UTF-8 > /etc/default/locale
# Each machine has an identity of its own, from its kernel command line.
: > /etc/machine-id

useradd --uid "$ID" --create-home --shell /bin/bash --groups sudo "$NAME"
echo '%sudo ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ruse
chmod 440 /etc/sudoers.d/ruse
install -d -m 700 -o "$NAME" -g "$NAME" "/home/$NAME/.ssh"
install -m 600 -o "$NAME" -g "$NAME" /parts/authorized_keys "/home/$NAME/.ssh/authorized_keys"

# Whoever has the serial console has the machine.
mkdir -p /etc/systemd/system/serial-getty@ttyS0.service.d
cat > /etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf << END
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin $NAME --noclear --keep-baud 115200,57600,38400,9600 - \$TERM
END

# The host reaches the SSH server by the socket device, whatever networks there are.
cat > /etc/systemd/system/ssh-vsock.socket << END
[Unit]
Description=SSH from the host
ConditionPathExists=/dev/vsock

[Socket]
ListenStream=vsock::22
Accept=yes

[Install]
WantedBy=sockets.target
END
cat > /etc/systemd/system/ssh-vsock@.service << END
[Unit]
Description=SSH session from the host

[Service]
ExecStart=-/usr/sbin/sshd -i
StandardInput=socket
RuntimeDirectory=sshd
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
END
systemctl --quiet enable ssh-vsock.socket
# From Debian 13 on, systemd has the same, but only if the device is there before it starts.
mkdir -p /etc/systemd/system-generators
ln -s /dev/null /etc/systemd/system-generators/systemd-ssh-generator

cat > /etc/systemd/network/80-dhcp.network << END
[Match]
Type=ether

[Network]
DHCP=yes
IPv6AcceptRA=yes

[DHCPv4]
ClientIdentifier=mac
END
systemctl --quiet enable systemd-networkd.service
# Everyone may ping, as on any Debian that has recommended packages.
echo 'net.ipv4.ping_group_range = 0 2147483647' > /etc/sysctl.d/50-ping.conf
# Names without dots are not asked of the neighbours, which takes seconds where nobody answers: each login asks for one, as PAM
# notes the address of its peer, which is UNKNOWN by the socket device.
mkdir -p /etc/systemd/resolved.conf.d
printf '[Resolve]\nLLMNR=no\nMulticastDNS=no\n' > /etc/systemd/resolved.conf.d/ruse.conf

# The clock is the host's, which KVM's interfaces tell: a real-time clock has whole seconds only, and a machine that was held
# has missed some.
sed -i '/^pool/d' /etc/chrony/chrony.conf
printf 'refclock PHC /dev/ptp0 poll 2 dpoll 1\nmakestep 0.05 -1\n' > /etc/chrony/conf.d/ruse.conf
mkdir -p /etc/systemd/system/chrony.service.d
cat > /etc/systemd/system/chrony.service.d/ruse.conf << END
[Service]
ExecCondition=+/bin/sh -c 'modprobe -q ptp_kvm; [ -e /dev/ptp0 ]'
END

# The host knows the system's SSH key and its user, so cloud-init keeps them. There are no locales but those of the C library.
if [ -d /etc/cloud/cloud.cfg.d ]; then
    cat > /etc/cloud/cloud.cfg.d/90_ruse.cfg << END
ssh_deletekeys: false
locale: C.UTF-8
system_info:
  default_user:
    name: $NAME
END
fi

# What waits for something that a machine of Ruse has not, or works for nobody.
systemctl --quiet mask systemd-networkd-wait-online.service getty@tty1.service systemd-pstore.service \
    e2scrub_reap.service e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer

rm -rf /var/cache/apt/*.bin /var/log/dpkg.log /var/log/alternatives.log /var/cache/debconf/*-old
echo "RUSE-HOST-KEY $(cut -d ' ' -f 1,2 /etc/ssh/ssh_host_ed25519_key.pub)"
