//! The accept loop: TLS handshakes in their own tasks with a deadline, a limit of connections in all and of one
//! address, and an end that lets what is in flight finish. What a connection may do once it stands is `connection`'s.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{Protocol, serve_connection};
use crate::config::Limits;

/// How long what is in flight may take once the end has begun.
pub const DRAIN: Duration = Duration::from_secs(10);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Its certificate chain, leaf first; empty without client certificates. The handshake has checked possession
    /// of the key; who it is, is asked anew for each request.
    pub certificates: Arc<Vec<CertificateDer<'static>>>,
}

/// What one address stands for when quotas are counted: an IPv6 host owns a whole /64.
pub fn quota_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Connections that stand, by address.
#[derive(Default)]
struct ByAddress(Mutex<HashMap<IpAddr, usize>>);

/// One of them; it is counted until this is dropped.
struct Counted(Arc<ByAddress>, IpAddr);

impl ByAddress {
    fn one_more(self: &Arc<Self>, address: IpAddr, max: usize) -> Option<Counted> {
        let key = quota_key(address);
        let mut standing = self.0.lock();
        let count = standing.entry(key).or_insert(0);
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Counted(Arc::clone(self), key))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut standing = self.0.0.lock();
        if let Some(count) = standing.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                standing.remove(&self.1);
            }
        }
    }
}

/// One listener: an address, with or without TLS, and what answers there.
pub struct Listener {
    /// For logs.
    pub name: &'static str,
    /// Where.
    pub socket: TcpListener,
    /// TLS; `None` only on loopback.
    pub tls: Option<Arc<arc_swap::ArcSwap<rustls::ServerConfig>>>,
    /// What answers.
    pub router: Router,
}

/// Serves until `stop`, then lets what is in flight finish, at most [`DRAIN`].
pub async fn serve(listener: Listener, limits: Limits, stop: CancellationToken) {
    let Listener { name, socket, tls, router } = listener;
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let by_address = Arc::new(ByAddress::default());
    let connections = TaskTracker::new();
    let limits = Arc::new(limits);
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = Arc::clone(&permits).acquire_owned() => permit,
        };
        let Ok(permit) = permit else { break };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = socket.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: others must end first.
                tracing::warn!(listener = name, %error, "can't accept");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let Some(counted) = by_address.one_more(address.ip(), limits.connections_per_address_max) else {
            tracing::debug!(listener = name, %address, "too many connections of this address; one more is dropped");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (tls, router, limits, stop) = (tls.clone(), router.clone(), Arc::clone(&limits), stop.clone());
        connections.spawn(async move {
            let _held = (permit, counted);
            match tls {
                // Without TLS nothing is agreed beforehand, so it is what everybody speaks.
                None => {
                    let peer = Peer { address, certificates: Arc::new(Vec::new()) };
                    serve_connection(stream, Protocol::Http1, peer, router, &limits, stop).await;
                }
                Some(tls) => {
                    let acceptor = TlsAcceptor::from(tls.load_full());
                    let deadline = Duration::from_millis(limits.handshake_ms_max);
                    let Ok(Ok(stream)) = tokio::time::timeout(deadline, acceptor.accept(stream)).await else {
                        tracing::debug!(listener = name, %address, "a TLS handshake failed or took too long");
                        return;
                    };
                    let (protocol, peer) = agreed(&stream, address);
                    serve_connection(stream, protocol, peer, router, &limits, stop).await;
                }
            }
        });
    }
    connections.close();
    if tokio::time::timeout(DRAIN, connections.wait()).await.is_err() {
        tracing::warn!(listener = name, "some connections were still busy and are dropped");
    }
}

/// What the handshake agreed on, and with whom.
fn agreed(stream: &tokio_rustls::server::TlsStream<TcpStream>, address: SocketAddr) -> (Protocol, Peer) {
    let session = stream.get_ref().1;
    let protocol = if session.alpn_protocol() == Some(b"h2") { Protocol::Http2 } else { Protocol::Http1 };
    let certificates: Vec<CertificateDer<'static>> =
        session.peer_certificates().into_iter().flatten().map(|c| c.clone().into_owned()).collect();
    (protocol, Peer { address, certificates: Arc::new(certificates) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_share_and_gives_it_back() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = Arc::new(ByAddress::default());
        let held: Vec<_> = (0..2).map(|_| all.one_more(ip("192.0.2.1"), 2).unwrap()).collect();
        assert!(all.one_more(ip("192.0.2.1"), 2).is_none());
        assert!(all.one_more(ip("::ffff:192.0.2.1"), 2).is_none(), "the same host by its other spelling");
        assert!(all.one_more(ip("192.0.2.2"), 2).is_some());
        drop(held);
        assert!(all.0.lock().is_empty(), "nothing is kept of who is gone");
        let _first = all.one_more(ip("2001:db8:1:2::1"), 1).unwrap();
        assert!(all.one_more(ip("2001:db8:1:2:ffff::9"), 1).is_none(), "one host owns its /64");
        assert!(all.one_more(ip("2001:db8:1:3::1"), 1).is_some());
    }
}
