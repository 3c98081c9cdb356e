//! Loopback ports for servers that are stopped and started again on the same ones.

use std::net::TcpListener;

use countersign::keys::random::{SystemRandom, random_bytes};

/// Free ports, each another one. Below the range from which the kernel takes ports for outgoing connections, so that nobody
/// takes one while its server restarts.
pub fn free_ports<const N: usize>() -> [u16; N] {
    // Held until all are chosen: none is chosen twice.
    let mut held = Vec::new();
    std::array::from_fn(|_| {
        loop {
            let [a, b] = random_bytes::<2>(&SystemRandom);
            let port = 10_000 + u16::from_be_bytes([a, b]) % 22_000;
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
                held.push(listener);
                return port;
            }
        }
    })
}
