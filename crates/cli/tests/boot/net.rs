//! Networks as Debian's kernel uses them: addresses, names, connections both ways, and switches between machines.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use crate::linux::{expect_shell, guest, run_script};
use crate::log;
use crate::machine::{Ended, Machine, PATIENCE, ruse};

/// Waits for an address by DHCP and one by SLAAC.
pub const WAIT: &str = "i=0; until ip addr show eth0 | grep -q 'inet ' && ip -6 route | grep -q default; do \
                    usleep 100000; i=$((i+1)); [ $i -lt 600 ] || break; done; ";
/// Bytes of a file that is fetched.
const FILE: usize = 3_000_000;

/// A server of HTTP that gives [`FILE`] bytes to everybody; its port.
pub fn web_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for peer in listener.incoming() {
            let mut peer = peer.unwrap();
            // The request's end is not of interest, and a client that has gone is none of this test's.
            let _ = peer.read(&mut [0; 1000]);
            let _ = peer.write_all(format!("HTTP/1.0 200 OK\r\nContent-Length: {FILE}\r\n\r\n").as_bytes());
            let _ = peer.write_all(&file());
        }
    });
    port
}

pub fn file() -> Vec<u8> {
    (0..FILE as u64 / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// A server that takes all there is and then says how much that was; its port.
fn counting_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for peer in listener.incoming() {
            let mut peer = peer.unwrap();
            let mut bytes = Vec::new();
            let _ = peer.read_to_end(&mut bytes);
            let _ = writeln!(peer, "{}", bytes.len());
        }
    });
    port
}

/// A name server that knows one answer to all questions for IPv4; its port.
fn name_server() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let question = &buffer[..len];
            // Behind the name: its type, 1 for an address of IPv4.
            let v4 = question[len - 4..] == [0, 1, 0, 1];
            let mut answer = question.to_vec();
            (answer[2], answer[3], answer[7]) = (0x81, 0x80, u8::from(v4));
            if v4 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 0, 2, 2]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    port
}

#[test]
fn the_default_guest_reaches_the_host() {
    let Some(files) = guest() else { return };
    let (web, count, dns) = (web_server(), counting_server(), name_server());
    let net = format!("user,loopback,dns=127.0.0.1:{dns}");
    let script = format!(
        "{WAIT}
        echo -- address; ip addr show eth0 | grep -o 'inet [0-9./]*'; ip route | grep -o 'default via [0-9.]*'
        ip addr show eth0 | grep -o 'inet6 fd52:[^:]*:[^:]*:'; cat /sys/class/net/eth0/mtu
        echo -- ping; ping -c 1 10.0.2.2 | grep -o '1 packets received'; ping -c 1 fd52:7573:6500::2 | grep -o '1 packets received'
        echo -- name; nslookup -type=a server.test 10.0.2.3 | grep -o 'Address: 10.0.2.2'
        echo -- get; wget -q -O - http://server.test:{web}/ | md5sum
        echo -- put; head -c 20000000 /dev/zero | nc 10.0.2.2 {count}
        echo -- closed; wget -q -O - http://10.0.2.2:1/ 2>&1 | grep -o refused
        {}echo -- end\n",
        log::SCRIPT
    );
    let options = ["--accel", "dbt", "--cpus", "2", "--net", &net];
    let ended = run_script(&files.kernel, &files, &options, "", &script);
    let address = ["inet 10.0.2.15/24", "default via 10.0.2.2", "inet6 fd52:7573:6500:", "65520"];
    assert_eq!(ended.section("address"), address);
    assert_eq!(ended.section("ping"), ["1 packets received"; 2]);
    assert_eq!(ended.section("name"), ["Address: 10.0.2.2"]);
    assert_eq!(ended.section("get"), [format!("{}  -", crate::disk::md5(&file()))]);
    assert_eq!(ended.section("put"), ["20000000"]);
    assert_eq!(ended.section("closed"), ["refused"]);
    log::check(&ended, 2);
}

#[test]
fn a_network_does_with_split_rings_and_an_interrupt_pin() {
    let Some(files) = guest() else { return };
    let web = web_server();
    let script = format!(
        "{WAIT}echo -- get; wget -q -O - http://10.0.2.2:{web}/ | md5sum; cat /sys/class/net/eth0/mtu\n\
         cat /sys/class/net/eth0/address; grep -o 'IO-APIC.*virtio' /proc/interrupts | cut -d' ' -f1\necho -- end\n"
    );
    let options = ["--accel", "dbt", "--net", "user,loopback,ring=split,mtu=1400,mac=02:00:00:00:00:42"];
    let ended = run_script(&files.kernel, &files, &options, "pci=nomsi", &script);
    let sum = format!("{}  -", crate::disk::md5(&file()));
    assert_eq!(ended.section("get")[..3], [&sum, "1400", "02:00:00:00:00:42"]);
    assert!(ended.section("get")[3..].contains(&"IO-APIC"));
}

#[test]
fn a_published_port_leads_to_the_default_guest() {
    let Some(_) = guest() else { return };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let publish = format!("{port}:80");
    let mut machine = Machine::on_terminal(&["--cmdline", "quiet", "--publish", &publish]);
    expect_shell(&mut machine);
    assert_eq!(machine.ask("httpd -h /etc; echo serves"), "serves");
    let limit = Instant::now() + PATIENCE;
    let mut answer = String::new();
    while !answer.contains("root:x:0:0") {
        // The guest may have no address yet.
        let mut peer = TcpStream::connect(("127.0.0.1", port)).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        answer.clear();
        let _ = peer.write_all(b"GET /passwd HTTP/1.0\r\n\r\n");
        let _ = peer.read_to_string(&mut answer);
        assert!(Instant::now() < limit, "nobody answers");
        thread::sleep(Duration::from_millis(100));
    }
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}

#[test]
fn two_machines_talk_over_a_switch() {
    let Some(_) = guest() else { return };
    let cmdline = |script: &str| format!("quiet {}", ruse_guest::run_argument(script));
    let serve = "ip addr add 192.168.7.1/24 dev eth0; httpd -h /bin; echo serves; sleep 1000\n";
    let mut server = Machine::start(&["--cmdline", &cmdline(serve), "--net", "switch=lab"]);
    server.expect("serves");
    let fetch = "ip addr add 192.168.7.2/24 dev eth0
        echo -- ping; ping -c 3 -w 60 192.168.7.1 | grep -o '3 packets received'
        echo -- fetched; wget -q -O - http://192.168.7.1/busybox | cmp - /bin/busybox && echo same; echo -- end\n";
    // In the same user's directory for machines, where the switch is.
    let words = ["run", "--accel", "dbt", "--cmdline", &cmdline(fetch), "--net", "switch=lab"];
    let output = ruse(server.runtime()).args(words).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\r', "");
    let console = text(&output.stdout);
    let ended = Ended { code: output.status.code(), console, messages: text(&output.stderr) }.with_code(0);
    assert_eq!(ended.section("ping"), ["3 packets received"]);
    assert_eq!(ended.section("fetched"), ["same"]);
}
