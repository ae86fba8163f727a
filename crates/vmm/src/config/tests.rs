//! Which configurations make a machine, and what the others are told.

use super::*;

const HOST: u64 = 64 << 30;

fn with(change: impl FnOnce(&mut MachineConfig)) -> Result<(), ConfigError> {
    let mut config = MachineConfig::new("vmlinuz");
    change(&mut config);
    config.validate(HOST)
}

#[test]
fn the_default_is_valid() {
    with(|_| {}).unwrap();
    let config = MachineConfig::new("vmlinuz");
    let saved = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<MachineConfig>(&saved).unwrap(), config);
}

#[test]
fn a_machine_has_a_name_for_networks() {
    assert_eq!(MachineConfig::host_name("Web_1.example"), "web-1-example");
    assert_eq!(MachineConfig::host_name("a-"), "a");
}

#[test]
fn the_disk_for_cloud_init_is_one_of_the_most() {
    let disks = |count| vec![DiskConfig::new("d".into()); count];
    let seed = Some(SeedConfig::default());
    with(|c| (c.disks, c.seed) = (disks(MAX_DISKS - 1), seed.clone())).unwrap();
    let error = with(|c| (c.disks, c.seed) = (disks(MAX_DISKS), seed.clone())).unwrap_err();
    assert!(error.to_string().contains("13 disks are too many"), "{error}");
}

#[test]
fn memory_has_limits() {
    for (bytes, option) in [
        (0, "too little"),
        (MIN_MEMORY - 4096, "too little"),
        (MIN_MEMORY + 1, "whole number"),
        (HOST + 4096, "this host has 64 GiB"),
        (ruse_memory::MAX_RAM + 4096, "the most is 1 TiB"),
        (!4095, "the most is 1 TiB"),
    ] {
        let error = with(|c| c.memory = bytes).unwrap_err().to_string();
        assert!(error.starts_with("--memory: ") && error.contains(option), "{error}");
    }
    with(|c| c.memory = MIN_MEMORY).unwrap();
    for (max, option) in [
        (DEFAULT_MEMORY - (2 << 20), "max=510 MiB is not a multiple of 2 MiB more"),
        (DEFAULT_MEMORY + 4096, "is not a multiple"),
        (HOST + DEFAULT_MEMORY, "this host has 64 GiB"),
        (2 << 40, "the most is 1 TiB"),
    ] {
        let error = with(|c| c.max_memory = Some(max)).unwrap_err().to_string();
        assert!(error.starts_with("--memory: ") && error.contains(option), "{error}");
    }
    with(|c| c.max_memory = Some(DEFAULT_MEMORY)).unwrap();
    with(|c| c.max_memory = Some(HOST)).unwrap();
    let pmem = PmemConfig { path: "x".into(), read_only: false };
    assert_eq!(with(|c| c.pmems = vec![pmem; 5]), Err(ConfigError::TooManyPmems { asked: 5 }));
}

#[test]
fn cpus_have_limits() {
    assert_eq!(with(|c| c.cpus = Topology::flat(0)), Err(ConfigError::NoCpus));
    with(|c| c.cpus = Topology::flat(MAX_CPUS)).unwrap();
    assert!(with(|c| c.cpus = Topology::flat(1000)).is_err());
    let huge = Topology { sockets: u32::MAX, cores: u32::MAX, threads: u32::MAX };
    assert!(matches!(with(|c| c.cpus = huge), Err(ConfigError::TooManyCpus { .. })));
    with(|c| c.cpus = Topology::flat(3)).unwrap();
    let odd = Topology { sockets: 2, cores: 3, threads: 1 };
    assert_eq!(with(|c| c.cpus = odd), Err(ConfigError::OddTopology));
}

#[test]
fn contradictions_are_named() {
    let both = with(|c| (c.tier, c.check) = (Some(0), true)).unwrap_err().to_string();
    assert!(both.contains("--check and --tier"), "{both}");
    let kvm = with(|c| (c.tier, c.accel) = (Some(0), Accel::Kvm)).unwrap_err().to_string();
    assert!(kvm.contains("--accel kvm"), "{kvm}");
    let profile = with(|c| (c.perf_map, c.accel) = (true, Accel::Kvm)).unwrap_err().to_string();
    assert!(profile.contains("--perf-map and --accel kvm"), "{profile}");
    assert_eq!(with(|c| c.tier = Some(2)), Err(ConfigError::Tier));
    let micro = |change: fn(&mut MachineConfig)| {
        with(|c| {
            c.kind = MachineKind::Microvm;
            change(c);
        })
    };
    micro(|_| {}).unwrap();
    for (option, change) in [
        ("--slots", (|c| c.slots = 1) as fn(&mut MachineConfig)),
        ("--watchdog", |c| c.watchdog = Some(WatchdogAction::None)),
    ] {
        let error = micro(change).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{option} and --machine microvm contradict")), "{error}");
    }
    assert_eq!(with(|c| c.slots = 9), Err(ConfigError::TooManySlots { asked: 9 }));
    let plain = with(|c| (c.tier, c.direct) = (Some(0), Direct::Always)).unwrap_err().to_string();
    assert!(plain.contains("--direct and --tier 0"), "{plain}");
    assert_eq!(with(|c| c.name.clear()), Err(ConfigError::Name));
}

#[test]
fn names_are_fit_for_files() {
    for bad in ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "a\n", "\u{e9}", &"x".repeat(65)] {
        assert_eq!(with(|c| c.name = bad.into()), Err(ConfigError::Name), "{bad}");
    }
    for good in ["a", "web-1.example_2", &"x".repeat(64)] {
        with(|c| c.name = good.into()).unwrap();
    }
}

#[test]
fn words_are_understood() {
    assert_eq!("file=/tmp/x".parse(), Ok(SerialMode::File("/tmp/x".into())));
    assert_eq!("null".parse(), Ok(SerialMode::Null));
    assert!("file=".parse::<SerialMode>().is_err());
    assert!("tty".parse::<SerialMode>().is_err());
    assert_eq!("dbt".parse(), Ok(Accel::Dbt));
    assert!("DBT".parse::<Accel>().is_err());
    assert_eq!("microvm".parse(), Ok(MachineKind::Microvm));
    assert!("q35".parse::<MachineKind>().is_err());
}
