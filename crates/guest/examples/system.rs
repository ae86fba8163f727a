//! Fetches the packages of a Debian system into a directory and tells how many there are.

use ruse_guest::{AptCommands, GuestError, Silent, SystemPlan};

fn main() -> Result<(), GuestError> {
    let dir = std::env::args_os().nth(1).expect("a directory");
    let packages = std::env::args().skip(2).collect();
    let plan = SystemPlan { release: "bookworm".into(), packages };
    let system = plan.fetch(&AptCommands::default(), dir.as_ref(), &mut Silent)?;
    println!(
        "{} packages, {} of them first; {} of the kernel",
        system.all.len(),
        system.base.len(),
        system.kernel.len()
    );
    Ok(())
}
