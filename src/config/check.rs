//! What must hold in the broker's own file, people and agents aside: addresses, issuers, tiers, limits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

use url::{Host, Url};

use crate::core::id::TierName;
use crate::core::tier::{Friction, Tier};

use super::algorithm::Algorithm;
use super::claim_path;
use super::directory::is_trust_domain;
use super::load::Problem;
use super::reader::Item;
use super::secret_ref::SecretRef;
use super::{BrokerConfig, IssuerConfig, IssuerPreset, Limits, ListenConfig, ReviewerLoginConfig, SpiffeConfig};

/// Most tiers.
pub const TIERS_MAX: usize = 16;
/// Longest life of a grant that a tier can give, in seconds.
pub const TIER_LIFE_SECS_MAX: u64 = 7 * 24 * 3600;
const DAY: u64 = 24 * 3600;

/// A URL that identities or people are sent to: https, or http on loopback.
pub(super) fn check_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|e| format!("isn't a URL ({e})"))?;
    let loopback = match url.host() {
        Some(Host::Domain(d)) => d == "localhost" || d.ends_with(".localhost"),
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => return Err("has no host".to_owned()),
    };
    match url.scheme() {
        "https" => {}
        "http" if loopback => {}
        _ => return Err("must begin with https:// (http:// only on loopback)".to_owned()),
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err("must have no user, query or fragment".to_owned());
    }
    Ok(url)
}

/// A URL of the broker's own: in its one normal form, without a trailing `/`, since others compare it byte by byte
/// and paths are added to it.
fn check_own_url(text: &str) -> Result<Url, String> {
    let url = check_url(text)?;
    let normal = url.as_str().trim_end_matches('/');
    if text.ends_with('/') {
        return Err("must not end in `/`: paths are added to it".to_owned());
    }
    if text != normal {
        return Err(format!("isn't in its normal form; write {normal}"));
    }
    Ok(url)
}

/// A secret reference that can be read now. It is read again, late, by who needs it.
pub(super) fn check_secret<T>(
    item: &Item<'_, T>,
    path: &[&str],
    r: &SecretRef,
    base: Option<&Path>,
    out: &mut Vec<Problem>,
) {
    let Some(base) = base else { return };
    if let Err(e) = r.read(base) {
        out.push(item.problem(path, e.to_string()));
    }
}

/// A file that can be opened now.
pub(super) fn check_file<T>(
    item: &Item<'_, T>,
    path: &[&str],
    file: &Path,
    base: Option<&Path>,
    out: &mut Vec<Problem>,
) {
    let Some(base) = base else { return };
    let file = base.join(file);
    if let Err(e) = std::fs::File::open(&file) {
        out.push(item.problem(path, format!("can't open {}: {e}", file.display())));
    }
}

pub(super) fn within<T>(item: &Item<'_, T>, key: &str, value: u64, min: u64, max: u64, out: &mut Vec<Problem>) {
    if !(min..=max).contains(&value) {
        out.push(item.problem(&[key], format!("`{key}` is {value}; it must be from {min} to {max}")));
    }
}

pub(super) fn broker(item: &Item<'_, BrokerConfig>, out: &mut Vec<Problem>, warnings: &mut Vec<Problem>) {
    let b = &item.value;
    for (key, text) in [("issuer", &b.issuer), ("reviewer_url", &b.reviewer_url)] {
        match check_own_url(text) {
            Err(what) => out.push(item.problem(&[key], format!("`{key}` {what}"))),
            Ok(url) if key == "reviewer_url" && !matches!(url.host(), Some(Host::Domain(_))) => warnings
                .push(item.problem(&[key], "passkeys need a name: a relying party can't be an IP address (WebAuthn)")),
            Ok(_) => {}
        }
    }
    // Zero would switch the combination rule off.
    within(item, "combination_window_secs", b.combination_window_secs, 1, 30 * DAY, out);
    within(item, "decide_within_secs", b.decide_within_secs, 1, 7 * DAY, out);
    within(item, "sweep_every_secs", b.sweep_every_secs, 1, DAY, out);
}

pub(super) fn listen(item: &Item<'_, ListenConfig>, has_spiffe: bool, base: Option<&Path>, out: &mut Vec<Problem>) {
    let l = &item.value;
    let all = [
        ("agent", Some(l.agent)),
        ("agent_mtls", l.agent_mtls),
        ("reviewer", Some(l.reviewer)),
        ("metrics", l.metrics),
    ];
    let mut seen: BTreeMap<SocketAddr, &str> = BTreeMap::new();
    for (key, addr) in all.into_iter().filter_map(|(k, a)| Some((k, a?))) {
        if addr.port() != 0
            && let Some(other) = seen.insert(addr, key)
        {
            out.push(item.problem(&[key], format!("`{key}` and `{other}` have the same address; each needs its own")));
        }
        if l.tls_cert.is_none() && key != "metrics" && !addr.ip().is_loopback() {
            out.push(item.problem(&[key], format!("`{key}` is reachable from outside; set `tls_cert` and `tls_key`")));
        }
    }
    if l.tls_cert.is_some() != l.tls_key.is_some() {
        out.push(item.problem(&["tls_cert"], "`tls_cert` and `tls_key` belong together; set both or neither"));
    }
    if l.agent_mtls.is_some() && l.tls_cert.is_none() {
        out.push(item.problem(&["agent_mtls"], "mutual TLS needs `tls_cert` and `tls_key`"));
    }
    if l.agent_mtls.is_some() && !has_spiffe {
        out.push(item.problem(&["agent_mtls"], "there is no [spiffe] section, so no certificate could be verified"));
    }
    if let Some(file) = &l.tls_cert {
        check_file(item, &["tls_cert"], file, base, out);
    }
    if let Some(key) = &l.tls_key {
        check_secret(item, &["tls_key"], key, base, out);
    }
}

pub(super) fn spiffe(
    item: &Item<'_, SpiffeConfig>,
    tiers: &TierNames<'_>,
    base: Option<&Path>,
    out: &mut Vec<Problem>,
) {
    let s = &item.value;
    if let Some(api) = &s.workload_api
        && !(api.starts_with("unix:") || api.starts_with("tcp://127.") || api.starts_with("tcp://[::1]"))
    {
        out.push(item.problem(&["workload_api"], "must be `unix:///PATH` (or tcp on a loopback address)"));
    }
    if s.trust_domains.is_empty() {
        out.push(item.problem(&["trust_domains"], "name at least one trust domain, or remove [spiffe]"));
    }
    for (i, domain) in s.trust_domains.iter().enumerate() {
        let at = i.to_string();
        if !is_trust_domain(domain) {
            let what = "a trust domain has lower-case letters, digits, `.`, `-`, `_`, without `spiffe://`";
            out.push(item.problem(&["trust_domains", &at], what));
        } else if s.workload_api.is_none() && !s.bundles.contains_key(domain) {
            let what = format!("no bundle for `{domain}`: set `workload_api`, or its file under [spiffe.bundles]");
            out.push(item.problem(&["trust_domains", &at], what));
        }
    }
    for (domain, file) in &s.bundles {
        if !s.trust_domains.contains(domain) {
            let what =
                format!("`{domain}` isn't in `trust_domains`, so its bundle admits nobody; add it or remove this");
            out.push(item.problem(&["bundles", domain], what));
        }
        check_file(item, &["bundles", domain], file, base, out);
    }
    if s.audience.trim().is_empty() {
        out.push(item.problem(&["audience"], "must name the exact audience of JWT-SVIDs"));
    }
    tiers.check(item, s.tier_max.as_ref(), out);
}

fn algorithms<T>(item: &Item<'_, T>, names: &[String], out: &mut Vec<Problem>) {
    if names.is_empty() || names.iter().any(|a| a.parse::<Algorithm>().is_err()) {
        let all = Algorithm::ALL.map(Algorithm::name).join(", ");
        out.push(item.problem(&["algorithms"], format!("`algorithms` may name: {all}")));
    }
}

pub(super) fn issuer(
    item: &Item<'_, IssuerConfig>,
    tiers: &TierNames<'_>,
    base: Option<&Path>,
    out: &mut Vec<Problem>,
) {
    let i = &item.value;
    if let Err(what) = check_url(&i.issuer) {
        out.push(item.problem(&["issuer"], format!("`issuer` {what}")));
    }
    if i.audience.trim().is_empty() {
        out.push(item.problem(&["audience"], "must name the exact audience that tokens carry"));
    }
    algorithms(item, &i.algorithms, out);
    within(item, "token_life_secs_max", i.token_life_secs_max, 1, 7 * DAY, out);
    for (key, file) in [("jwks_file", &i.jwks_file), ("ca_file", &i.ca_file)] {
        if let Some(file) = file {
            check_file(item, &[key], file, base, out);
        }
    }
    if let Some(launcher) = &i.launcher {
        if launcher.claim.is_empty() {
            out.push(item.problem(&["launcher", "claim"], "`claim` must name the claim that holds the launcher's id"));
        }
        if let Some(Err(what)) = launcher.issuer.as_deref().map(check_url) {
            out.push(item.problem(&["launcher", "issuer"], format!("`issuer` {what}")));
        }
    }
    for (claim, values) in &i.require {
        if values.is_empty() || values.iter().any(|v| v.is_empty() || v.contains('*')) {
            let what = format!("`{claim}` needs exact values; `*` has no meaning here (regression A13)");
            out.push(item.problem(&["require", claim], what));
        }
        if let Err(what) = claim_path::segments(claim) {
            out.push(item.problem(&["require", claim], what));
        }
    }
    for (name, path) in &i.attributes {
        if let Err(what) = claim_path::check_attribute(name).and_then(|()| claim_path::segments(path)) {
            out.push(item.problem(&["attributes", name], what));
        }
    }
    pinned(item, out);
    tiers.check(item, i.tier_max.as_ref(), out);
}

/// Names of repositories and projects can be renamed and taken over: the immutable number has to be pinned.
fn pinned(item: &Item<'_, IssuerConfig>, out: &mut Vec<Problem>) {
    let (what, claims) = match item.value.preset {
        IssuerPreset::GithubActions => ("GitHub Actions", ["repository_id", "repository_owner_id"]),
        IssuerPreset::Gitlab => ("GitLab", ["project_id", "namespace_id"]),
        IssuerPreset::Kubernetes | IssuerPreset::Generic => return,
    };
    let require = &item.value.require;
    if !claims.iter().any(|c| require.contains_key(*c)) {
        let [a, b] = claims;
        let what = format!(
            "{what}: pin `{a}` or `{b}` under `require` (names can be renamed and taken over; without a pin every \
             repository of that host could come), for example require = {{ {a} = [\"123456\"] }}"
        );
        out.push(item.problem(&["require"], what));
    }
    for claim in claims {
        let values = require.get(claim).into_iter().flatten();
        if values.into_iter().any(|v| !v.contains('*') && !v.bytes().all(|b| b.is_ascii_digit())) {
            out.push(item.problem(&["require", claim], format!("`{claim}` is a number, for example \"123456\"")));
        }
    }
}

pub(super) fn reviewer_login(item: &Item<'_, ReviewerLoginConfig>, base: Option<&Path>, out: &mut Vec<Problem>) {
    let r = &item.value;
    if let Err(what) = check_url(&r.issuer) {
        out.push(item.problem(&["issuer"], format!("`issuer` {what}")));
    }
    if r.client_id.trim().is_empty() {
        out.push(item.problem(&["client_id"], "must name the client registered at the issuer"));
    }
    algorithms(item, &r.algorithms, out);
    if let Some(Err(what)) = r.groups_claim.as_deref().map(claim_path::segments) {
        out.push(item.problem(&["groups_claim"], what));
    }
    within(item, "groups_age_secs_max", r.groups_age_secs_max, 1, 7 * DAY, out);
    within(item, "session_secs_max", r.session_secs_max, 1, 7 * DAY, out);
    within(item, "session_idle_secs_max", r.session_idle_secs_max, 1, r.session_secs_max, out);
    if let Some(secret) = &r.client_secret {
        check_secret(item, &["client_secret"], secret, base, out);
    }
    if let Some(file) = &r.ca_file {
        check_file(item, &["ca_file"], file, base, out);
    }
}

/// The names of tiers that references may use.
pub(super) struct TierNames<'a> {
    pub(super) names: BTreeSet<&'a str>,
    /// Tiers that could not be read: they exist.
    pub(super) unread: &'a [String],
}

impl TierNames<'_> {
    fn check<T>(&self, item: &Item<'_, T>, name: Option<&TierName>, out: &mut Vec<Problem>) {
        if let Some(name) = name
            && !self.names.contains(name.as_str())
            && !self.unread.iter().any(|t| t == name.as_str())
        {
            let known: Vec<&str> = self.names.iter().copied().collect();
            out.push(
                item.problem(&["tier_max"], format!("there is no tier `{name}`; there are: {}", known.join(", "))),
            );
        }
    }
}

pub(super) fn tiers(items: &[Item<'_, Tier>], out: &mut Vec<Problem>, warnings: &mut Vec<Problem>) {
    if items.len() > TIERS_MAX {
        out.push(items[TIERS_MAX].problem(&[], format!("more than {TIERS_MAX} tiers")));
    }
    for (i, item) in items.iter().enumerate() {
        let t = &item.value;
        within(item, "life_secs_max", t.life_secs_max, 1, TIER_LIFE_SECS_MAX, out);
        within(item, "approvals", t.approvals.into(), 0, 16, out);
        if (t.approvals == 0) != (t.friction == Friction::None) {
            let what = format!("tier {}: friction `none` and 0 approvals belong together", t.name);
            out.push(item.problem(&["friction"], what));
        }
        if t.friction == Friction::Critical && t.approvals < 2 {
            let what = format!("tier {}: friction `critical` is two persons: set approvals = 2 or more", t.name);
            out.push(item.problem(&["approvals"], what));
        }
        if t.friction == Friction::High {
            let what = format!(
                "tier {}: passkeys are not enforced yet: one click of a browser session decides. What must not rest on \
                 that belongs in a tier with friction `critical` (two persons, the target typed)",
                t.name
            );
            warnings.push(item.problem(&["friction"], what));
        }
        let Some(milder) = i.checked_sub(1).map(|p| &items[p].value) else { continue };
        if t.approvals < milder.approvals || t.friction < milder.friction {
            let what = format!(
                "tier {} asks for less than {} before it; tiers stand in order of strictness, mildest first, so that \
                 approvals and friction never fall",
                t.name, milder.name
            );
            out.push(item.problem(&[], what));
        }
    }
}

pub(super) fn limits(item: &Item<'_, Limits>, out: &mut Vec<Problem>) {
    let l = &item.value;
    let n = |v: usize| u64::try_from(v).unwrap_or(u64::MAX);
    for (key, value, min, max) in [
        ("body_bytes_max", n(l.body_bytes_max), 1024, 1024 * 1024),
        ("json_depth_max", n(l.json_depth_max), 4, 64),
        ("header_bytes_max", n(l.header_bytes_max), 4096, 256 * 1024),
        ("pending_per_agent_max", n(l.pending_per_agent_max), 1, 10_000),
        ("open_grants_per_agent_max", n(l.open_grants_per_agent_max), 1, 100_000),
        ("requests_per_agent_per_sec", l.requests_per_agent_per_sec.into(), 1, 100_000),
        ("requests_per_agent_burst", l.requests_per_agent_burst.into(), 1, 100_000),
        ("introspections_per_sec", l.introspections_per_sec.into(), 1, 1_000_000),
        ("introspections_burst", l.introspections_burst.into(), 1, 1_000_000),
        ("cli_logins_per_address_max", n(l.cli_logins_per_address_max), 1, 10_000),
        ("connections_max", n(l.connections_max), 1, 100_000),
        ("connections_per_address_max", n(l.connections_per_address_max), 1, 100_000),
        ("handshake_ms_max", l.handshake_ms_max, 100, 60_000),
        ("header_read_ms_max", l.header_read_ms_max, 100, 60_000),
        ("body_read_ms_max", l.body_read_ms_max, 100, 60_000),
        ("idle_ms_max", l.idle_ms_max, 100, 600_000),
        ("wait_secs_max", l.wait_secs_max, 1, 300),
        ("delegation_depth_max", n(l.delegation_depth_max), 0, 16),
        ("invocations_per_grant_max", n(l.invocations_per_grant_max), 1, 100_000),
        ("intent_chars_max", n(l.intent_chars_max), 16, 4_000),
        ("refusals_per_agent_per_min", l.refusals_per_agent_per_min.into(), 1, 10_000),
    ] {
        within(item, key, value, min, max, out);
    }
}
