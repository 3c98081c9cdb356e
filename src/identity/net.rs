//! HTTP to issuers, guarded (regression A12): no redirects, no proxies, size and time limits, and only addresses
//! that were looked at. The address that was checked is the address that is connected to, so nothing rebinds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::error::{IdentityError, Refusal, refuse};

/// A whole request, in seconds.
pub const FETCH_SECS_MAX: u64 = 8;
/// A connection with its TLS handshake, in seconds.
pub const CONNECT_SECS_MAX: u64 = 4;
/// Largest CA file, in bytes.
const CA_BYTES_MAX: u64 = 256 * 1024;

/// Which addresses may be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Public addresses, by HTTPS.
    Public,
    /// Loopback and private addresses too, and plain HTTP on loopback. Link-local (where clouds keep their
    /// metadata services), multicast and reserved addresses stay out of reach.
    Private,
}

/// How a name becomes addresses. The system's resolver, except in tests of rebinding.
pub type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, std::io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// The system's resolver.
pub fn system_lookup() -> Lookup {
    Arc::new(|name| Box::pin(async move { Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect()) }))
}

/// A client that reaches only what it may.
#[derive(Clone)]
pub struct Fetcher {
    client: reqwest::Client,
    reach: Reach,
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetcher").field("reach", &self.reach).finish_non_exhaustive()
    }
}

impl Fetcher {
    /// Builds the client. `ca_file` (PEM), if given, is the only authority that its HTTPS trusts.
    pub fn new(reach: Reach, ca_file: Option<&Path>, lookup: Lookup) -> Result<Self, IdentityError> {
        let bad = |what: String| IdentityError::new(Refusal::Configuration, what);
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .https_only(reach == Reach::Public)
            .connect_timeout(Duration::from_secs(CONNECT_SECS_MAX))
            .timeout(Duration::from_secs(FETCH_SECS_MAX))
            .pool_max_idle_per_host(1)
            // A pooled connection outlives no change of addresses that matters.
            .pool_idle_timeout(Duration::from_secs(10))
            .dns_resolver(Guarded { reach, lookup })
            .user_agent(concat!("countersign/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = ca_file {
            let why = |e: &dyn std::fmt::Display| bad(format!("can't use the CA file {}: {e}", path.display()));
            let size = std::fs::metadata(path).map_err(|e| why(&e))?.len();
            if size > CA_BYTES_MAX {
                return Err(why(&"larger than 256 KiB"));
            }
            let pem = std::fs::read(path).map_err(|e| why(&e))?;
            let certs = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| why(&e))?;
            if certs.is_empty() {
                return Err(why(&"it holds no PEM certificate"));
            }
            builder = builder.tls_certs_only(certs);
        }
        let client = builder.build().map_err(|e| bad(format!("can't build the HTTP client: {e}")))?;
        Ok(Self { client, reach })
    }

    /// Checks that a URL is one that may be fetched: HTTPS (plain HTTP only to a loopback address, and only with
    /// [`Reach::Private`]), no credentials in it, no literal address out of reach.
    pub fn check_url(&self, url: &str) -> Result<Url, IdentityError> {
        check_url(url, self.reach)
    }

    /// GET, at most `bytes_max` bytes, status 200 only.
    pub async fn get(&self, url: &str, bytes_max: usize) -> Result<Vec<u8>, IdentityError> {
        let url = self.check_url(url)?;
        self.run(self.client.get(url).header("accept", "application/json"), bytes_max).await.and_then(
            |(status, body)| {
                if status == 200 {
                    Ok(body)
                } else {
                    refuse(
                        Refusal::KeysUnavailable,
                        format!("the issuer answered {status}; redirects are not followed"),
                    )
                }
            },
        )
    }

    /// POST of a form; gives the status and at most `bytes_max` bytes.
    pub async fn post_form(
        &self,
        url: &str,
        form: &[(&str, &str)],
        basic: Option<(&str, &str)>,
        bytes_max: usize,
    ) -> Result<(u16, Vec<u8>), IdentityError> {
        let url = self.check_url(url)?;
        let mut request = self.client.post(url).header("accept", "application/json").form(form);
        if let Some((user, password)) = basic {
            request = request.basic_auth(user, Some(password));
        }
        self.run(request, bytes_max).await
    }

    async fn run(&self, request: reqwest::RequestBuilder, bytes_max: usize) -> Result<(u16, Vec<u8>), IdentityError> {
        let mut response = request.send().await.map_err(unreachable_issuer)?;
        let status = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable_issuer)? {
            if body.len() + chunk.len() > bytes_max {
                return refuse(
                    Refusal::KeysUnavailable,
                    format!("the issuer's answer is larger than {bytes_max} bytes"),
                );
            }
            body.extend_from_slice(&chunk);
        }
        Ok((status, body))
    }
}

/// Names the innermost cause; the URL (which the issuer may have chosen) is left out.
#[allow(clippy::needless_pass_by_value)] // for `map_err`
fn unreachable_issuer(error: reqwest::Error) -> IdentityError {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    IdentityError::new(Refusal::KeysUnavailable, format!("can't reach the issuer: {cause}"))
}

fn check_url(text: &str, reach: Reach) -> Result<Url, IdentityError> {
    let bad = |what: &str| refuse(Refusal::Configuration, format!("a URL of the issuer {what}"));
    let Ok(url) = Url::parse(text) else {
        return bad("is not a URL");
    };
    let address = match url.host() {
        Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
        Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
        Some(Host::Domain(_)) => None,
        None => return bad("has no host"),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return bad("holds credentials");
    }
    if address.is_some_and(|ip| !may_reach(ip, reach)) {
        return bad("points to an address that may not be reached (see allow_private_network)");
    }
    let loopback = address.is_some_and(|ip| ip.is_loopback()) || url.host_str() == Some("localhost");
    match url.scheme() {
        "https" => Ok(url),
        "http" if reach == Reach::Private && loopback => Ok(url),
        _ => bad("is not https"),
    }
}

struct Guarded {
    reach: Reach,
    lookup: Lookup,
}

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let found = (self.lookup)(name.as_str().to_owned());
        let reach = self.reach;
        Box::pin(async move {
            let addresses = found.await?;
            // One bad address spoils the answer: a name that points inside is not the issuer's to give.
            if addresses.is_empty() || addresses.iter().any(|a| !may_reach(a.ip(), reach)) {
                return Err(
                    "the name resolves to an address that may not be reached (see allow_private_network)".into()
                );
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// True if a connection to this address is allowed.
pub fn may_reach(ip: IpAddr, reach: Reach) -> bool {
    let kind = match ip {
        IpAddr::V4(ip) => kind_v4(ip),
        IpAddr::V6(ip) => kind_v6(ip),
    };
    match kind {
        Kind::Public => true,
        Kind::Private => reach == Reach::Private,
        Kind::Never => false,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Public,
    Private,
    Never,
}

/// The IANA special-purpose registry.
#[allow(clippy::match_same_arms)] // one line a group of ranges
fn kind_v4(ip: Ipv4Addr) -> Kind {
    let [a, b, c, _] = ip.octets();
    match (a, b, c) {
        (127 | 10, ..) | (172, 16..=31, _) | (192, 168, _) | (100, 64..=127, _) => Kind::Private,
        (0 | 224.., ..) | (169, 254, _) | (198, 18 | 19, _) => Kind::Never,
        (192, 0, 0 | 2) | (192, 88, 99) | (198, 51, 100) | (203, 0, 113) => Kind::Never,
        _ => Kind::Public,
    }
}

fn kind_v6(ip: Ipv6Addr) -> Kind {
    let s = ip.segments();
    let tail = |hi: u16, lo: u16| kind_v4(Ipv4Addr::from_bits(u32::from(hi) << 16 | u32::from(lo)));
    match s {
        [0, 0, 0, 0, 0, 0, 0, 1] | [0xfc00..=0xfdff, ..] => Kind::Private,
        // An IPv4 address in another dress is judged as what it is: mapped, NAT64, 6to4.
        [0, 0, 0, 0, 0, 0xffff, hi, lo] | [0x64, 0xff9b, 0, 0, 0, 0, hi, lo] | [0x2002, hi, lo, ..] => tail(hi, lo),
        // Teredo, ORCHID and other special ranges; documentation.
        [0x2001, 0..=0x01ff | 0x0db8, ..] | [0x3fff, 0..=0x0fff, ..] => Kind::Never,
        [0x2000..=0x3fff, ..] => Kind::Public,
        _ => Kind::Never,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a12_addresses_inside_are_out_of_reach_in_every_dress() {
        let kind = |text: &str| {
            let ip = text.parse().unwrap();
            (may_reach(ip, Reach::Public), may_reach(ip, Reach::Private))
        };
        for public in ["1.1.1.1", "140.82.112.3", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"] {
            assert_eq!(kind(public), (true, true), "{public}");
        }
        for private in ["127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd00::1"] {
            assert_eq!(kind(private), (false, true), "{private}");
        }
        for dressed in ["::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::ffff:10.0.0.1"] {
            assert_eq!(kind(dressed), (false, true), "{dressed}");
        }
        for never in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "fe80::1",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "::169.254.169.254",
            "fec0::1",
            "64:ff9b:1::1",
        ] {
            assert_eq!(kind(never), (false, false), "{never}");
        }
    }

    #[test]
    fn a12_urls_must_be_https_and_name_nothing_inside() {
        for bad in [
            "http://issuer.example",
            "ftp://issuer.example",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://0x7f.1/",
            "https://2130706433/",
            "https://user:pw@issuer.example/",
            "file:///etc/passwd",
            "https://",
            "x",
            "https://169.254.169.254/latest",
        ] {
            assert!(check_url(bad, Reach::Public).is_err(), "{bad}");
        }
        assert!(check_url("https://issuer.example/a", Reach::Public).is_ok());
        assert!(check_url("http://127.0.0.1:8080/a", Reach::Private).is_ok());
        assert!(check_url("http://10.0.0.1/a", Reach::Private).is_err());
        assert!(check_url("https://10.0.0.1/a", Reach::Private).is_ok());
        assert!(check_url("https://169.254.169.254/a", Reach::Private).is_err());
    }

    #[tokio::test]
    async fn a12_a_name_that_rebinds_is_looked_at_again_each_time() {
        // First public, then inside: the resolver is ours, so what it hands out was checked, each time.
        let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let lookup: Lookup = Arc::new(move |_| {
            let n = counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let addresses: Vec<SocketAddr> = match n {
                0 => vec![([93, 184, 216, 34], 0).into()],
                1 => vec![([127, 0, 0, 1], 0).into()],
                _ => vec![([93, 184, 216, 34], 0).into(), ([169, 254, 169, 254], 0).into()],
            };
            Box::pin(async move { Ok(addresses) })
        });
        let guarded = Guarded { reach: Reach::Public, lookup };
        assert!(guarded.resolve("issuer.example".parse().unwrap()).await.is_ok());
        assert!(guarded.resolve("issuer.example".parse().unwrap()).await.is_err());
        assert!(guarded.resolve("issuer.example".parse().unwrap()).await.is_err());
        assert_eq!(calls.load(std::sync::atomic::Ordering::SeqCst), 3);
    }
}
