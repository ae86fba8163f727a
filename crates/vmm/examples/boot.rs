//! Scratch.
use ruse_vmm::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let mut c = MachineConfig::new(&a[1]);
    c.initrd = Some(a[2].clone().into());
    c.cmdline = a[3].clone();
    c.tier = std::env::var("TIER").ok().map(|t| t.parse().unwrap());
    c.check = std::env::var("CHECK").is_ok();
    if let Ok(n) = std::env::var("CPUS") {
        c.cpus = n.parse().unwrap();
    }
    let (e, _) = engine_for(&c).unwrap();
    let m = Machine::load(c).unwrap();
    let out = std::fs::File::options().write(true).open("/dev/stdout").unwrap();
    let m = m.start(&*e, Console::to_file(out)).unwrap();
    let ctl = m.control();
    if let Ok(s) = std::env::var("DUMP") {
        let c2 = m.control();
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_secs(s.parse().unwrap()));
            c2.pause();
            std::thread::sleep(std::time::Duration::from_millis(300));
            eprintln!("{:#x?}", c2.info());
            c2.stop();
        });
    }
    let o = m.wait();
    match &o {
        Outcome::TripleFault { dump, .. } => eprintln!("TRIPLE {dump}"),
        _ => eprintln!("{o:?}"),
    }
    eprintln!("{:?}", ctl.info());
}
