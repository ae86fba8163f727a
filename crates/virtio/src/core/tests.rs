//! Negotiation, queues that are lent, resets at any time.

use super::*;
use crate::features::{RING_RESET, VERSION_1};
use crate::testing::Echo;

const LAYOUT: Layout = Layout { size: 8, descriptors: 0x1000, driver: 0x2000, device: 0x3000 };

/// A device whose driver has taken these features and enabled queue 0.
fn live(features: u64) -> Core {
    let mut core = Core::new(Box::new(Echo::new()));
    start(&mut core, features);
    core
}

fn start(core: &mut Core, features: u64) {
    core.set_status(3);
    core.set_driver_features(features | VERSION_1);
    core.set_status(3 | status::FEATURES_OK);
    core.set_layout(0, |layout| *layout = LAYOUT);
    core.enable(0);
    core.set_status(3 | status::FEATURES_OK | status::DRIVER_OK);
    assert_eq!(core.take_notices(), [Notice::Serve(0), Notice::Serve(1)]);
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    for (features, agreed) in
        [(0, false), (VERSION_1, true), (VERSION_1 | 1 << 5, true), (VERSION_1 | 1 << 6, false)]
    {
        let mut core = Core::new(Box::new(Echo::new()));
        core.set_status(3);
        core.set_driver_features(features);
        core.set_status(11);
        assert_eq!(core.status() & status::FEATURES_OK != 0, agreed, "{features:#x}");
        core.set_driver_features(VERSION_1 | 1 << 5);
        assert_eq!(
            core.driver_features() == features,
            agreed || features == VERSION_1 | 1 << 5,
            "they are fixed"
        );
        core.set_status(15);
        assert!(agreed || core.status() & status::DRIVER_OK == 0 || core.status() & status::FEATURES_OK != 0);
    }
}

#[test]
fn a_queue_is_served_only_while_the_device_is_live() {
    let mut core = Core::new(Box::new(Echo::new()));
    core.set_layout(0, |layout| *layout = LAYOUT);
    core.enable(0);
    assert!(!core.is_enabled(0), "there are no features yet");
    let mut core = live(0);
    assert!(core.begin(1).is_none() && core.begin(9).is_none());
    let work = core.begin(0).unwrap();
    assert!(core.begin(0).is_none() && core.is_busy() && core.state().is_none(), "it is lent");
    core.set_layout(0, |layout| layout.size = 2);
    assert_eq!(core.layout(0), LAYOUT, "an enabled queue stays where it is");
    assert!(core.finish(work, Ok(Served { interrupt: true, more: true, ..Served::default() })));
    assert_eq!(core.take_notices(), [Notice::Used(0)]);
    assert!(core.begin(0).is_some());
}

#[test]
fn a_reset_waits_for_the_queue_that_is_lent() {
    let mut core = live(0);
    let work = core.begin(0).unwrap();
    core.set_status(0);
    assert_ne!(core.status(), 0, "the driver has to wait");
    core.set_status(3);
    core.enable(1);
    assert!(core.begin(1).is_none());
    assert!(!core.finish(work, Ok(Served { interrupt: true, more: true, ..Served::default() })));
    assert_eq!((core.status(), core.is_enabled(0), core.driver_features()), (0, false, 0));
    assert_eq!(core.take_notices(), [Notice::Serve(0), Notice::Serve(1)], "who serves them hears of it");
    assert!(core.begin(0).is_none() && core.resets() == 1);
    assert_eq!(core.layout(0), Layout { size: 8, ..Layout::default() });
    start(&mut core, 0);
    assert_eq!(core.begin(0).unwrap().resets, 1, "a handler is told");
}

#[test]
fn a_queue_is_reset_alone_and_enabled_again() {
    let mut core = live(RING_RESET);
    let work = core.begin(0).unwrap();
    core.reset_queue(0);
    assert!(core.is_queue_resetting(0) && core.is_enabled(0));
    assert!(!core.finish(work, Ok(Served { interrupt: true, more: true, ..Served::default() })));
    assert!(core.take_notices().is_empty());
    assert!(!core.is_queue_resetting(0) && !core.is_enabled(0));
    core.set_layout(0, |layout| *layout = LAYOUT);
    core.enable(0);
    assert_eq!(core.take_notices(), [Notice::Serve(0)], "the device runs on");
    core.reset_queue(0);
    assert!(!core.is_enabled(0));
    let mut without = live(0);
    without.reset_queue(0);
    assert!(without.is_enabled(0), "it was not negotiated");
}

#[test]
fn a_broken_queue_needs_a_reset() {
    let mut core = live(0);
    let work = core.begin(0).unwrap();
    assert!(!core.finish(work, Err(RingError::Memory { at: 0 })));
    assert_eq!(core.take_notices(), [Notice::Config]);
    core.set_status(15);
    assert_eq!(core.status(), 15 | status::NEEDS_RESET, "the driver cannot clear it");
    assert!(core.begin(0).is_none());
    core.set_status(0);
    assert_eq!(core.status(), 0);
}

#[test]
fn a_saved_state_is_restored() {
    let core = live(1 << 5);
    let state = core.state().unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let mut other = Core::new(Box::new(Echo::new()));
    other.restore(&serde_json::from_str(&text).unwrap());
    assert_eq!(other.state().unwrap(), state);
    assert!(other.take_notices().contains(&Notice::Serve(0)));
    assert_eq!(other.begin(0).unwrap().features, 1 << 5 | VERSION_1);
}

/// A core whose queue 0 has buffers with somebody outside.
fn outside() -> Core {
    let mut core = live(RING_RESET);
    let work = core.begin(0).unwrap();
    core.finish(work, Ok(Served { outside: true, ..Served::default() }));
    assert!(core.is_busy() && core.state().is_none());
    core
}

#[test]
fn a_reset_waits_for_buffers_that_are_outside() {
    let mut core = outside();
    core.set_status(0);
    assert_eq!(core.take_notices(), [Notice::Serve(0)], "its handler takes them back");
    assert!(core.status() != 0 && core.begin(0).is_none());
    core.recalled(1);
    assert_ne!(core.status(), 0);
    core.recalled(0);
    assert_eq!((core.status(), core.resets(), core.is_busy()), (0, 1, false));
}

#[test]
fn the_reset_of_a_queue_waits_for_buffers_that_are_outside() {
    let mut core = outside();
    core.reset_queue(0);
    assert_eq!(core.take_notices(), [Notice::Serve(0)]);
    assert!(core.is_queue_resetting(0) && core.begin(0).is_none() && core.is_enabled(0));
    core.recalled(0);
    assert!(!core.is_queue_resetting(0) && !core.is_enabled(0) && !core.is_busy());
}

#[test]
fn buffers_that_are_outside_when_a_lent_queue_comes_back_are_taken_back() {
    let mut core = live(RING_RESET);
    let work = core.begin(0).unwrap();
    core.set_status(0);
    assert!(!core.finish(work, Ok(Served { outside: true, ..Served::default() })));
    assert_eq!(core.take_notices(), [Notice::Serve(0)]);
    assert_ne!(core.status(), 0);
    core.recalled(0);
    assert_eq!(core.status(), 0);
}
