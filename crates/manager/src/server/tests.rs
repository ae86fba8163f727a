use std::sync::Mutex;

use super::*;
use crate::{Client, ManagerError, Name, Registry, attach};
use ruse_vmm::{Console, MachineConfig};

/// Notes what it is asked, and refuses to be reset.
#[derive(Default)]
struct Notes(Mutex<Vec<Request>>);

impl Target for Arc<Notes> {
    fn request(&self, request: Request) -> Answer {
        self.0.lock().unwrap().push(request.clone());
        match request {
            Request::Reset => Answer::error(ErrorKind::Ended, "it has ended"),
            _ => Answer::Done,
        }
    }
}

struct World {
    _dir: tempfile::TempDir,
    registry: Registry,
    notes: Arc<Notes>,
    guests: Option<Guests>,
    console: Console,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::at(dir.path().join("ruse")).unwrap();
    let registration = registry.register(&Name::Exactly("m".into()), &MachineConfig::new("vmlinuz")).unwrap();
    let (hub, console) = ConsoleHub::around(Console::default()).unwrap();
    let notes = Arc::<Notes>::default();
    let guests = serve(registration, notes.clone(), hub).unwrap();
    World { _dir: dir, registry, notes, guests: Some(guests), console }
}

#[test]
fn requests_are_carried_out_in_their_order() {
    let world = world();
    let mut client = Client::connect(&world.registry, "m").unwrap();
    client.request(Request::Pause).unwrap();
    Client::connect(&world.registry, "m").unwrap().request(Request::Resume).unwrap();
    let error = client.request(Request::Reset).unwrap_err();
    assert!(matches!(error, ManagerError::Refused { kind: ErrorKind::Ended, .. }), "{error}");
    assert_eq!(*world.notes.0.lock().unwrap(), [Request::Pause, Request::Resume, Request::Reset]);
}

#[test]
fn nonsense_is_answered_and_harms_nobody() {
    let world = world();
    let mut stream = world.registry.connect_control("m").unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut ask = |text: &[u8]| {
        stream.write_all(text).unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        answer
    };
    assert!(ask(b"\n").contains("bad-request"));
    assert!(ask(b"\xff\0{\n").contains("bad-request"));
    assert!(ask(b"{\"version\":9,\"request\":\"info\"}\n").contains("bad-version"));
    assert_eq!(ask(b"{\"version\":1,\"request\":\"pause\"}\n"), "{\"answer\":\"done\"}\n");
    assert!(ask(&vec![b'x'; LINE_LIMIT as usize]).contains("too long"));
    Client::connect(&world.registry, "m").unwrap().request(Request::Pause).unwrap();
}

#[test]
fn too_many_clients_are_sent_away_and_may_come_later() {
    let world = world();
    let mut clients: Vec<_> = (0..MOST_CLIENTS)
        .map(|_| {
            let mut client = Client::connect(&world.registry, "m").unwrap();
            client.request(Request::Pause).unwrap();
            client
        })
        .collect();
    let surplus = Client::connect(&world.registry, "m").unwrap().request(Request::Pause);
    assert!(matches!(surplus, Err(ManagerError::Silent { .. })), "{surplus:?}");
    clients.pop();
    while Client::connect(&world.registry, "m").unwrap().request(Request::Pause).is_err() {}
}

#[test]
fn viewers_of_the_console_see_the_end_and_the_folder_goes() {
    let mut world = world();
    let mut viewer = attach(&world.registry, "m").unwrap();
    world.console.output.as_mut().unwrap().write(b"last words").unwrap();
    let mut seen = [0; 10];
    viewer.read_exact(&mut seen).unwrap();
    world.guests = None;
    assert_eq!(viewer.read(&mut [0]).unwrap(), 0);
    assert!(matches!(Client::connect(&world.registry, "m"), Err(ManagerError::NoMachine { .. })));
    assert!(world.registry.list().unwrap().is_empty());
}
