//! The reviewer's commands. Deciding yes happens in the browser: outside `dev` a session that the command line
//! keeps can't approve, since an agent under the same account could use it (guarantee 6, regression D1).

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use crate::client::ReviewerClient;
use crate::client::exec::{EXIT_DENIED, EXIT_PENDING};
use crate::client::waiting::Waiting;
use crate::core::digest::Digest;
use crate::core::id::{GrantId, LeaseId, ResourceName};
use crate::core::vote::Verdict;
use crate::wire::reviewer::Review;

use super::grant_text;
use super::term::{Look, ask, duration, print, print_json, safe};
use super::{CliError, attest, review_text};

pub use super::freeze::{FreezeArgs, freeze};

/// How often a decision is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// `login`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  countersign login --url https://countersign.corp

The session can look, deny, revoke and freeze. To approve, the page is opened in your browser. It is kept in
~/.local/state/countersign (or COUNTERSIGN_SESSION_FILE), readable by you alone, and ends by itself.")]
pub struct LoginArgs {
    /// The reviewers' pages
    #[arg(long, value_name = "URL", value_parser = reviewers_url)]
    url: String,
    /// PEM of the CA that signed their certificate [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print the address only
    #[arg(long)]
    no_browser: bool,
}

/// Sign in.
pub async fn login(args: LoginArgs) -> Result<i32, CliError> {
    // Kept with the session, which is used from other folders too.
    let ca = args.ca.map(std::fs::canonicalize).transpose().map_err(|e| CliError::said(format!("--ca: {e}")))?;
    let client = ReviewerClient::new(&args.url, ca.as_deref(), None)?;
    let begun = client.begin_login(&format!("countersign on {}", host_name())).await?;
    print(&format!(
        "Open      {}\nand see that it shows the code      {}\n",
        safe(&begun.url),
        Look::of_stdout().bold(&safe(&begun.code))
    ))?;
    if !args.no_browser {
        open_browser(&begun.url);
    }
    let kept = {
        let _waiting = Waiting::quietly("waiting until you confirm it there");
        client.finish_login(&begun, ca).await?
    };
    let me = ReviewerClient::stored()?.me().await?;
    print(&format!("signed in as {}; the session is kept in {}\n", safe(&me.name), kept.display()))?;
    Ok(0)
}

/// `inbox`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  countersign inbox\n  countersign inbox --json | jq '.mine[].id'")]
pub struct InboxArgs {
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// What waits for a decision.
pub async fn inbox(args: InboxArgs) -> Result<i32, CliError> {
    let queue = ReviewerClient::stored()?.queue().await?;
    if args.json {
        print_json(&queue)?;
    } else {
        print(&review_text::inbox(Look::of_stdout(), &queue))?;
    }
    Ok(0)
}

/// `show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  countersign show gr_06a1v3pz8t5q3r4c9m2x7k0w1h")]
pub struct ShowArgs {
    /// The grant
    #[arg(value_name = "GRANT")]
    id: GrantId,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Everything about one grant.
pub async fn show(args: ShowArgs) -> Result<i32, CliError> {
    let review = ReviewerClient::stored()?.review(args.id).await?;
    if args.json {
        print_json(&review)?;
    } else {
        print(&review_text::story(Look::of_stdout(), &review))?;
    }
    Ok(0)
}

/// `approve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  countersign approve gr_06a1v3pz8t5q3r4c9m2x7k0w1h

Exit codes: 0 your vote or the decision is in, 1 failed, 75 nothing was decided in time, 77 denied.")]
pub struct ApproveArgs {
    /// The grant
    #[arg(value_name = "GRANT")]
    id: GrantId,
    /// How long to wait for the decision
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = duration)]
    wait: Duration,
    /// Print the address only
    #[arg(long)]
    no_browser: bool,
    /// Vote from this terminal: `countersign dev` alone takes that
    #[arg(long)]
    here: bool,
    /// With --here: don't ask again
    #[arg(long, requires = "here")]
    yes: bool,
}

/// Show the sentence, open the page, wait for the decision there.
pub async fn approve(args: ApproveArgs) -> Result<i32, CliError> {
    let client = ReviewerClient::stored()?;
    let before = client.review(args.id).await?;
    print(&format!("{}\n", review_text::decision(Look::of_stdout(), &before)))?;
    if before.grant.state != "pending" {
        return Err(CliError::said(format!(
            "there is nothing to decide: the request is {}",
            safe(&before.grant.state)
        )));
    }
    if let Err(why) = &before.may_vote {
        return Err(CliError::said(format!("you can't vote on this: {}", safe(why))));
    }
    if args.here {
        // On exactly what was printed above.
        let digest = digest(&before)?;
        if !args.yes && !ask("Approve exactly this? Type y:", "y")? {
            return Err(CliError::said("not approved: nothing was sent"));
        }
        let view = client.vote(args.id, Verdict::Approve, digest, None).await?;
        print(&grant_text::grant(Look::of_stdout(), &view))?;
        return Ok(0);
    }
    let me = client.me().await?;
    let mine = |review: &Review| review.votes.iter().filter(|v| v.person == me.name).count();
    let waiting = Waiting::for_person("decide in the browser", &before.grant.review_url);
    if !args.no_browser {
        open_browser(&before.grant.review_url);
    }
    let decided = |review: &Review| review.grant.state != "pending" || mine(review) > mine(&before);
    let after = poll(&client, args.id, args.wait, decided).await?;
    drop(waiting);
    let state = after.grant.state.as_str();
    let (code, says) = match state {
        "pending" if decided(&after) => {
            let needed = grant_text::approvals(after.grant.approvals, after.grant.approvals_needed);
            (0, format!("your vote is in: {needed}"))
        }
        "pending" => (EXIT_PENDING, "nothing was decided in time; the request still waits".to_owned()),
        "active" | "ending" | "ended" => (0, "approved".to_owned()),
        "lapsed" => (EXIT_PENDING, "nobody decided in time".to_owned()),
        _ => (EXIT_DENIED, format!("the request is {}", safe(state))),
    };
    print(&format!("{says}\n"))?;
    Ok(code)
}

/// `deny`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  countersign deny gr_06a1v3pz8t5q3r4c9m2x7k0w1h --reason 'ask for the one table that you need'"
)]
pub struct DenyArgs {
    /// The grant
    #[arg(value_name = "GRANT")]
    id: GrantId,
    /// Why: the agent gets it
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Say no.
pub async fn deny(args: DenyArgs) -> Result<i32, CliError> {
    let client = ReviewerClient::stored()?;
    let review = client.review(args.id).await?;
    let view = client.vote(args.id, Verdict::Deny, digest(&review)?, Some(args.reason)).await?;
    if args.json {
        print_json(&view)?;
    } else {
        print(&grant_text::grant(Look::of_stdout(), &view))?;
    }
    Ok(0)
}

/// `revoke`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  countersign revoke gr_06a1v3pz8t5q3r4c9m2x7k0w1h --reason 'wrong table' --wait
  countersign revoke --force-absent --target pg-old --reason 'cluster deleted, CHG-1204'

--force-absent is for operators, when a target is gone for good and its credentials can never be proven gone. It is
recorded as your word, never as a proof, and refused while anything answers at the target's address. Should the target
come back, a sweep ends what it finds there.")]
pub struct RevokeArgs {
    /// The grant
    #[arg(value_name = "GRANT", group = "attested", required_unless_present = "force_absent")]
    id: Option<GrantId>,
    /// Attest that the target no longer exists, instead of a proof: of the grant, of one credential, or all of a target
    #[arg(long, conflicts_with = "wait", requires = "attested")]
    force_absent: bool,
    /// With --force-absent: one credential
    #[arg(long, value_name = "LEASE", requires = "force_absent", group = "attested", conflicts_with = "id")]
    lease: Option<LeaseId>,
    /// With --force-absent: all at one target
    #[arg(long, value_name = "NAME", requires = "force_absent", group = "attested", conflicts_with_all = ["id", "lease"])]
    target: Option<ResourceName>,
    /// Why: it stands in the record
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Wait until every credential is proven gone, at most so long [default: 5m]; 75 means not yet
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "5m",
          value_parser = duration)]
    wait: Option<Duration>,
    /// For scripts
    #[arg(long)]
    json: bool,
}

/// Take a grant away.
pub async fn revoke(args: RevokeArgs) -> Result<i32, CliError> {
    let client = ReviewerClient::stored()?;
    if args.force_absent {
        let of = attest::of(args.id, args.lease, args.target)?;
        return attest::attest(&client, of, args.reason, args.json).await;
    }
    let id = args.id.ok_or_else(|| CliError::said("name the grant"))?; // clap asks for one
    let mut view = client.revoke(id, args.reason).await?;
    let mut code = 0;
    if let Some(wait) = args.wait {
        let _waiting = Waiting::quietly("waiting for the proofs");
        let over = |review: &Review| !matches!(review.grant.state.as_str(), "active" | "ending");
        let after = poll(&client, id, wait, over).await?;
        code = if over(&after) { 0 } else { EXIT_PENDING };
        view = after.grant;
    }
    if args.json {
        print_json(&view)?;
    } else {
        print(&grant_text::grant(Look::of_stdout(), &view))?;
    }
    Ok(code)
}

fn digest(review: &Review) -> Result<Digest, CliError> {
    review.digest.ok_or_else(|| {
        CliError::said(format!("there is nothing to decide: the request is {}", safe(&review.grant.state)))
    })
}

/// Looks again and again until it is `done`, at most for `wait`. A broker that restarts meanwhile is waited for.
async fn poll(
    client: &ReviewerClient,
    id: GrantId,
    wait: Duration,
    done: impl Fn(&Review) -> bool,
) -> Result<Review, CliError> {
    let deadline = Instant::now() + wait;
    loop {
        match client.review(id).await {
            Ok(review) if done(&review) || Instant::now() >= deadline => return Ok(review),
            Ok(_) => {}
            Err(error) if error.is_transient() && Instant::now() < deadline => {}
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(LOOK_EVERY.min(deadline.saturating_duration_since(Instant::now()))).await;
    }
}

/// `https`, or `http` to this machine: a session crosses this line.
fn reviewers_url(text: &str) -> Result<String, String> {
    let url = url::Url::parse(text).map_err(|e| format!("not a URL ({e}); write https://HOST"))?;
    let loopback = match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if loopback => {}
        _ => return Err("must be https (plain http is for this machine only)".to_owned()),
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err("write scheme, host and port alone".to_owned());
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// Where a command runs, as the page that confirms a login says.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "an unknown host".to_owned() } else { name.to_owned() }
}

/// Where somebody sits at a desktop. Whether it works doesn't matter: the address is printed too.
fn open_browser(address: &str) {
    // An address and nothing else: no option, no file.
    if !url::Url::parse(address).is_ok_and(|u| matches!(u.scheme(), "http" | "https")) {
        return;
    }
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    let desktop = cfg!(target_os = "macos") || set("DISPLAY") || set("WAYLAND_DISPLAY");
    if !desktop || !std::io::stdout().is_terminal() {
        return;
    }
    let program = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let started =
        Command::new(program).arg(address).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    if let Ok(mut child) = started {
        std::thread::spawn(move || child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_crosses_tls_or_stays_on_this_machine() {
        for good in [
            "https://countersign.corp",
            "https://c.corp:8443/",
            "http://localhost:1234",
            "http://127.0.0.1:1",
            "http://[::1]:2",
        ] {
            assert_eq!(reviewers_url(good).unwrap(), good.trim_end_matches('/'));
        }
        for bad in [
            "countersign.corp",
            "http://countersign.corp",
            "http://localhost.evil.example",
            "ftp://localhost",
            "https://a:b@c.corp",
            "https://c.corp/?x=1",
            "file:///etc/passwd",
        ] {
            assert!(reviewers_url(bad).is_err(), "{bad}");
        }
    }
}
