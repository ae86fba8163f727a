//! Stops a process and its children for a moment, again and again, as job control, freezers and snapshots of hosts do.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// How long they run between two stops, and how long a stop takes. A guest's clock goes on meanwhile.
const RUN: Duration = Duration::from_millis(300);
const STOP: Duration = Duration::from_millis(30);

/// Dropped, it stops no more.
pub struct Stops {
    over: Arc<AtomicBool>,
}

impl Stops {
    /// Begins with process `id`, which has to be there as long as this is.
    pub fn begin(id: u32) -> Stops {
        let over = Arc::new(AtomicBool::new(false));
        let stops = Stops { over: over.clone() };
        thread::spawn(move || {
            loop {
                thread::sleep(RUN);
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let family = family(id);
                signal(&family, Signal::STOP);
                thread::sleep(STOP);
                signal(&family, Signal::CONT);
            }
        });
        stops
    }
}

impl Drop for Stops {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// The process and its children, which its threads have made.
fn family(id: u32) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let children: Vec<String> = children.collect();
    let ids = children.iter().flat_map(|line| line.split_whitespace()).filter_map(|word| word.parse().ok());
    ids.chain([id as i32]).filter_map(Pid::from_raw).collect()
}

fn signal(family: &[Pid], signal: Signal) {
    for process in family {
        // It may have ended.
        let _ = kill_process(*process, signal);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    fn state(id: u32) -> Option<char> {
        let text = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        text.rsplit_once(") ")?.1.chars().next()
    }

    #[test]
    fn children_are_stopped_and_go_on() {
        let mut parent = Command::new("sh").args(["-c", "sleep 60 & wait"]).spawn().unwrap();
        let limit = Instant::now() + Duration::from_secs(20);
        while family(parent.id()).len() < 2 {
            assert!(Instant::now() < limit, "it has no child");
            thread::sleep(Duration::from_millis(5));
        }
        let ids: Vec<u32> =
            family(parent.id()).into_iter().map(|id| id.as_raw_nonzero().get() as u32).collect();
        let stops = Stops::begin(parent.id());
        for stopped in [true, false] {
            while ids.iter().any(|id| (state(*id) == Some('T')) != stopped) {
                assert!(Instant::now() < limit, "{stopped}");
                thread::sleep(Duration::from_millis(2));
            }
        }
        drop(stops);
        let child = family(parent.id());
        signal(&child, Signal::KILL);
        parent.wait().unwrap();
    }
}
