//! A TCP proxy that lets requests through and, once it is closed, holds back the answers to those that carry a marker:
//! the target has done it, and the broker doesn't know. Nothing of what passes is changed.
#![allow(dead_code)] // each test binary uses a part

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The proxy. Dropping it ends it.
pub struct Gate {
    /// Where it listens.
    pub port: u16,
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

struct State {
    closed: watch::Sender<bool>,
    markers: Vec<Vec<u8>>,
    /// Answers that wait now.
    held: AtomicUsize,
}

impl Gate {
    /// In front of a loopback port; open. Requests with one of the markers are those whose answers it can hold.
    pub async fn start(to: u16, markers: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let markers = markers.iter().map(|m| m.as_bytes().to_vec()).collect();
        let state = Arc::new(State { closed: watch::Sender::new(false), markers, held: AtomicUsize::new(0) });
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                tokio::spawn(carry(client, to, Arc::clone(&shared)));
            }
        });
        Self { port, state, task }
    }

    /// From now on, answers to marked requests wait.
    pub fn close(&self) {
        self.state.closed.send_replace(true);
    }

    /// Whatever waits goes on, and nothing waits any more.
    pub fn open(&self) {
        self.state.closed.send_replace(false);
    }

    /// How many answers have come from the target and wait.
    pub fn held(&self) -> usize {
        self.state.held.load(Ordering::SeqCst)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
        self.task.abort();
    }
}

async fn carry(client: TcpStream, to: u16, state: Arc<State>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
    let (_, _) = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let marked = Arc::new(AtomicBool::new(false));
    // Whichever side goes away takes the other with it, as a real disconnect does.
    tokio::select! {
        () = up(from_client, to_server, &state, &marked) => {}
        () = down(from_server, to_client, &state, &marked) => {}
    }
}

async fn up(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State, marked: &AtomicBool) {
    let longest = state.markers.iter().map(Vec::len).max().unwrap_or(1);
    let (mut tail, mut buffer) = (Vec::new(), vec![0; 16 * 1024]);
    loop {
        let Ok(n @ 1..) = from.read(&mut buffer).await else { return };
        tail.extend_from_slice(&buffer[..n]);
        if *state.closed.borrow() && state.markers.iter().any(|m| tail.windows(m.len()).any(|w| w == m)) {
            // Before it goes on its way: its answer can't come first.
            marked.store(true, Ordering::SeqCst);
        }
        tail.drain(..tail.len().saturating_sub(longest - 1));
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

async fn down(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State, marked: &AtomicBool) {
    let mut closed = state.closed.subscribe();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let Ok(n @ 1..) = from.read(&mut buffer).await else { return };
        if marked.load(Ordering::SeqCst) {
            let _held = Held::new(&state.held);
            if closed.wait_for(|closed| !closed).await.is_err() {
                return;
            }
            marked.store(false, Ordering::SeqCst);
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// Counts one answer while it waits, however that ends.
struct Held<'a>(&'a AtomicUsize);

impl<'a> Held<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
