//! The host's side of the network cases: a server that takes and gives bytes, and a client of the guest's.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};

const BUFFER: usize = 128 << 10;

/// The server.
pub struct Host {
    port: u16,
}

impl Host {
    /// Listens on a port of an address of this host's.
    pub fn start(address: Ipv4Addr) -> Result<Host> {
        let listener = TcpListener::bind((address, 0)).with_context(|| format!("listening at {address}"))?;
        let port = listener.local_addr()?.port();
        thread::spawn(move || {
            for peer in listener.incoming().flatten() {
                // A guest that ends early is noticed by what it does not print.
                thread::spawn(move || serve(peer).ok());
            }
        });
        Ok(Host { port })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A port for the guest's server, which nobody uses now.
    pub fn free_port() -> Result<u16> {
        Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
    }

    /// Connects to the guest's server so many times, one after the other, in the background.
    pub fn connect(port: u16, count: u32) {
        thread::spawn(move || {
            let mut left = count;
            while left > 0 {
                if ask(port).is_ok() {
                    left -= 1;
                }
            }
        });
    }
}

/// One byte there and back.
fn ask(port: u16) -> std::io::Result<()> {
    let mut peer = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    peer.set_nodelay(true)?;
    peer.write_all(b"?")?;
    peer.read_exact(&mut [0])
}

/// Reads what the guest wants and how many bytes, and takes or gives them.
fn serve(mut peer: TcpStream) -> std::io::Result<()> {
    let (mut head, mut buffer) = ([0; 9], vec![0; BUFFER]);
    peer.read_exact(&mut head)?;
    let mut left = u64::from_le_bytes(head[1..].try_into().expect("eight bytes"));
    while left > 0 {
        let size = left.min(BUFFER as u64) as usize;
        left -= match head[0] {
            b's' => match peer.read(&mut buffer[..size])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => count as u64,
            },
            _ => peer.write(&buffer[..size])? as u64,
        };
    }
    if head[0] == b's' { peer.write_all(b"!") } else { Ok(()) }
}
