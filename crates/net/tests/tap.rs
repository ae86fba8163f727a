//! Interfaces of the host, in a network namespace made for the test. It needs no root where users may have namespaces; where
//! they may not, or there is no tun driver, it says so and is left out.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use ruse_net::tap::{Tap, TapConfig, TapKind};
use ruse_net::{Driver, HEADER_LEN, Network, Offloads, Port, Received, Slice};

/// Set in the process that is in a namespace of its own.
const INSIDE: &str = "RUSE_TEST_IN_NAMESPACE";

/// Runs a test of this file in a namespace of its own, in which `setup` has been run. `true` there.
fn inside(name: &str, setup: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let run = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--mount", "sh", "-ec", script, "sh"]);
        command.arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        command.output()
    };
    // Once: a namespace is taken down some time after its last process, with what it has under /dev.
    match run(&format!("{{ {setup}; }} >&2; test -w /dev/net/tun; echo set up; exec \"$@\"")) {
        Ok(output) if output.stdout.starts_with(b"set up\n") => {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
        }
        tried => println!("skipped, there can be no such interface here: {tried:?}"),
    }
    false
}

fn open(kind: TapKind, pairs: u16, namespace: Option<PathBuf>) -> (std::sync::Arc<Tap>, Vec<Port>) {
    let (tap, ports) = Tap::open(&TapConfig { kind, pairs, namespace, mtu: None }).unwrap();
    tap.start(Driver { offloads: Offloads::CHECKSUM | Offloads::TSO4, knows_mtu: true });
    tap.set_pairs(1);
    (tap, ports)
}

/// Asks who has 10.9.0.1, and waits for the answer.
fn ask(port: &mut Port) {
    let mut request = vec![0; HEADER_LEN];
    request.extend([0xff; 6]);
    request.extend([2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9, 10, 9, 0, 2]);
    request.extend([0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        port.sender.send(&[Slice::from(&mut request[..])]);
        let mut answer = false;
        let start = Instant::now();
        while !answer && start.elapsed() < Duration::from_millis(200) {
            let received = port.receiver.receive(&mut |frame| {
                let frame = frame.concat();
                answer |=
                    frame.get(HEADER_LEN + 12..HEADER_LEN + 22) == Some(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
                true
            });
            if received == Received::Nothing {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if answer {
            return;
        }
        assert!(Instant::now() < limit, "nobody answers");
    }
}

#[test]
fn a_tap_leads_to_the_host() {
    let setup = "ip tuntap add t0 mode tap; ip addr add 10.9.0.1/24 dev t0; ip link set t0 mtu 1400 up";
    if inside("a_tap_leads_to_the_host", setup) {
        let (tap, mut ports) = open(TapKind::Tap("t0".into()), 1, None);
        assert_eq!((tap.offer().mtu, tap.mac()), (Some(1400), None));
        ask(&mut ports[0]);
    }
}

#[test]
fn a_tap_has_several_queues_of_which_some_are_in_use() {
    let setup = "ip tuntap add t0 mode tap multi_queue; ip addr add 10.9.0.1/24 dev t0; ip link set t0 up";
    if inside("a_tap_has_several_queues_of_which_some_are_in_use", setup) {
        let (tap, mut ports) = open(TapKind::Tap("t0".into()), 3, None);
        for pairs in [1, 3, 2, 1] {
            tap.set_pairs(pairs);
            assert_eq!(ports[2].receiver.receive(&mut |_| true), Received::Nothing);
        }
        ask(&mut ports[0]);
    }
}

#[test]
fn a_tap_that_is_deleted_leads_nowhere() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let setup = "ip tuntap add t0 mode tap; ip addr add 10.9.0.1/24 dev t0; ip link set t0 up";
    if inside("a_tap_that_is_deleted_leads_nowhere", setup) {
        let (tap, mut ports) = open(TapKind::Tap("t0".into()), 1, None);
        ask(&mut ports[0]);
        assert!(tap.is_connected());
        assert!(Command::new("ip").args(["link", "del", "t0"]).status().unwrap().success());
        let receiver = &mut ports[0].receiver;
        while tap.is_connected() {
            receiver.receive(&mut |_| true);
        }
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready =
            poll(&mut [PollFd::from_borrowed_fd(receiver.source(), PollFlags::IN)], Some(&now)).unwrap();
        assert_eq!((ready, receiver.receive(&mut |_| true)), (0, Received::Nothing), "nobody wakes for it");
    }
}

#[test]
fn a_new_tap_is_at_a_bridge() {
    let setup = "ip link add b0 type bridge; ip addr add 10.9.0.1/24 dev b0; ip link set b0 up";
    if inside("a_new_tap_is_at_a_bridge", setup) {
        let (_tap, mut ports) = open(TapKind::Bridge("b0".into()), 1, None);
        ask(&mut ports[0]);
    }
}

#[test]
fn a_tap_is_found_in_a_namespace() {
    let setup = "mount -t tmpfs run /run; ip netns add other; ip -n other tuntap add t0 mode tap; \
                 ip -n other addr add 10.9.0.1/24 dev t0; ip -n other link set t0 up";
    if inside("a_tap_is_found_in_a_namespace", setup) {
        let tap = |namespace| TapConfig { kind: TapKind::Tap("t0".into()), pairs: 1, namespace, mtu: None };
        let error = Tap::open(&tap(None)).err().unwrap().to_string();
        assert_eq!(error, "--net: cannot use tap 't0': there is no such interface");
        assert!(Tap::open(&tap(Some("none".into()))).is_err());
        for namespace in ["other", "/run/netns/other"] {
            let (_tap, mut ports) = open(TapKind::Tap("t0".into()), 1, Some(namespace.into()));
            ask(&mut ports[0]);
        }
    }
}

#[test]
fn a_macvtap_says_which_address_is_heard() {
    let setup = "ip tuntap add t0 mode tap; ip link set t0 up; ip link add link t0 name m0 address 02:00:00:00:00:09 \
                 type macvtap mode bridge; ip link set m0 up; mount -t sysfs s /sys; \
                 test -w /dev/tap$(cat /sys/class/net/m0/ifindex)";
    if inside("a_macvtap_says_which_address_is_heard", setup) {
        let (tap, _ports) = open(TapKind::Macvtap("m0".into()), 1, None);
        assert_eq!(tap.mac(), Some([2, 0, 0, 0, 0, 9]));
    }
}
