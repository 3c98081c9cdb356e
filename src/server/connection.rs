//! One connection, from its first byte to its end: HTTP/1.1 or HTTP/2 as the handshake agreed, and the clocks that end
//! it when nothing is asked on it. Who holds a connection open and asks nothing must not keep others out.

use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::listen::Peer;
use crate::config::Limits;

/// HTTP/2 streams of one connection at once.
const STREAMS_MAX: u32 = 128;
/// How often the other end of an HTTP/2 connection is asked whether it is still there, and how long it may think.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How long the other end may take to hear that the connection ends, and to go.
const GOODBYE: Duration = Duration::from_secs(1);

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Requests of a connection: so many in flight, and has there been one?
#[derive(Debug, Clone, Copy, Default)]
struct Requests {
    in_flight: u32,
    any: bool,
}

/// Counts one request for as long as it is answered.
struct InFlight(watch::Sender<Requests>);

impl InFlight {
    fn new(requests: watch::Sender<Requests>) -> Self {
        requests.send_modify(|r| *r = Requests { in_flight: r.in_flight + 1, any: true });
        Self(requests)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|r| r.in_flight -= 1);
    }
}

/// Serves one connection until either end is done with it, or it is idle for too long. After `stop`, until what is in
/// flight is answered.
pub async fn serve_connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    protocol: Protocol,
    peer: Peer,
    router: Router,
    limits: &Limits,
    stop: CancellationToken,
) {
    let requests = watch::Sender::new(Requests::default());
    let seen = requests.subscribe();
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        let in_flight = InFlight::new(requests.clone());
        request.extensions_mut().insert(peer.clone());
        let answer = router.clone().oneshot(Request::from(request.map(axum::body::Body::new)));
        async move {
            let answer = answer.await;
            drop(in_flight);
            answer
        }
    });
    let stream = TokioIo::new(stream);
    match protocol {
        Protocol::Http1 => {
            let mut builder = http1::Builder::new();
            // One clock for both protocols: below, not hyper's.
            builder.timer(TokioTimer::new()).header_read_timeout(None);
            // The buffer alone would let more pass, when more comes at once.
            builder.max_header_size(limits.header_bytes_max).max_buf_size(limits.header_bytes_max.max(8192));
            watched(builder.serve_connection(stream, service), seen, limits, stop).await;
        }
        Protocol::Http2 => {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE)
                .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX))
                .max_concurrent_streams(STREAMS_MAX);
            watched(builder.serve_connection(stream, service), seen, limits, stop).await;
        }
    }
}

async fn watched<C: GracefulConnection>(
    connection: C,
    mut requests: watch::Receiver<Requests>,
    limits: &Limits,
    stop: CancellationToken,
) where
    C::Error: std::fmt::Display,
{
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended badly");
            }
            return;
        }
        () = idle(&mut requests, |r| Duration::from_millis(if r.any { limits.idle_ms_max } else { limits.header_read_ms_max })) => {
            tracing::debug!("a connection asked nothing for too long and is ended");
        }
        () = stop.cancelled() => {}
    }
    // Nothing new from here on. What is in flight is answered; who doesn't go by then is left.
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        _ = connection => {}
        () = idle(&mut requests, |_| GOODBYE) => {}
    }
}

/// Ready once nothing was in flight for so long without a break.
async fn idle(requests: &mut watch::Receiver<Requests>, patience: impl Fn(Requests) -> Duration) {
    loop {
        let now = *requests.borrow_and_update();
        if now.in_flight > 0 {
            // An error means that the service is gone, and with it the connection.
            if requests.changed().await.is_err() {
                return;
            }
        } else if tokio::time::timeout(patience(now), requests.changed()).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_idle_only_while_nothing_is_in_flight() {
        let sender = watch::Sender::new(Requests::default());
        let mut seen = sender.subscribe();
        let ms = Duration::from_millis;
        let begun = tokio::time::Instant::now();
        let busy = async {
            let one = InFlight::new(sender.clone());
            tokio::time::sleep(ms(200)).await;
            // One ends while another goes on.
            let two = InFlight::new(sender.clone());
            drop(one);
            tokio::time::sleep(ms(200)).await;
            drop(two);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = busy => unreachable!("it never ends"),
            () = idle(&mut seen, |r| if r.any { ms(70) } else { ms(0) }) => {}
        }
        assert!(begun.elapsed() >= ms(200 + 200 + 70), "{:?}", begun.elapsed());
        let quiet = watch::Sender::new(Requests::default());
        let begun = tokio::time::Instant::now();
        idle(&mut quiet.subscribe(), |r| if r.any { ms(600_000) } else { ms(50) }).await;
        assert!(begun.elapsed() >= ms(50), "the first request has a time of its own");
    }
}
