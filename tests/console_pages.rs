//! The reviewer's pages, rendered from fixtures into `target/console-fixtures` (to be looked at) and held
//! against what they promise: nothing from outside unescaped or unseen, bounded, Enter never approves.

#[path = "console/fixtures.rs"]
mod fixtures;
#[path = "console/hostile.rs"]
mod hostile;

use std::path::PathBuf;

use countersign::core::tier::Friction;
use countersign::server::console::{
    ASSETS, CSP, Chrome, CliLogin, FreezeForm, FreezePage, LoginView, LoginWay, Mode, PAGE_BYTES_MAX, asset,
    cli_login_confirm, css_path, freeze, icon_path, js_path, login, problem, queue, request, signed_out, visible,
};
use countersign::wire::Problem;
use countersign::wire::reviewer::{FreezeResult, Queue, Review};
use fixtures::{NOW, chrome};
use hostile::{HOSTILE, hostile};

/// Every page there is, by name.
fn pages() -> Vec<(&'static str, String)> {
    let c = chrome();
    let out = Chrome::new(None, "pre".into(), NOW, Mode::Dev);
    let form = FreezeForm {
        kind: "agent".into(),
        value: "spiffe://corp.example/agents/importer".into(),
        reason: "It loops.".into(),
        ..FreezeForm::default()
    };
    let q = fixtures::queue();
    let counted = FreezePage {
        form: form.clone(),
        count: Some(FreezeResult { id: None, grants: (30..34).map(fixtures::id).collect() }),
        may_freeze: true,
        ..FreezePage::default()
    };
    let way = |way| LoginView { way, notice: None };
    let bad = Problem {
        kind: "urn:countersign:problem:stale-digest".into(),
        title: "The request changed".into(),
        status: 409,
        detail: "Your vote was about an earlier form of this request, so it doesn't count.".into(),
        next: Some("Read the page again and decide on what it says now.".into()),
        rule: None,
        nearest: vec![],
        retry_after: None,
        grant: Some(fixtures::id(1).to_string()),
    };
    let review = |r: Review, notice: Option<&str>| request(&r, &c, notice);
    vec![
        ("queue", queue(&q, &c)),
        ("queue-empty", queue(&Queue::default(), &c)),
        ("pending-export", review(fixtures::pending_export(), None)),
        ("pending-change", review(fixtures::pending(), None)),
        (
            "pending-critical",
            review(fixtures::pending_critical(), Some("Carla Moreau approved. One more person is needed.")),
        ),
        ("pending-not-mine", review(fixtures::pending_not_mine(), None)),
        ("active", review(fixtures::active(), Some("Approved. It is in force."))),
        ("stuck", review(fixtures::stuck(), None)),
        ("ended", review(fixtures::ended(), None)),
        ("denied", review(fixtures::over("denied", 25), None)),
        ("refused", review(fixtures::over("refused", 26), None)),
        ("withdrawn", review(fixtures::over("withdrawn", 27), None)),
        ("lapsed", review(fixtures::over("lapsed", 28), None)),
        ("long", review(fixtures::long(), None)),
        ("hostile", review(hostile(), None)),
        ("freeze", freeze(&FreezePage { form, freezes: &q.freezes, may_freeze: true, ..FreezePage::default() }, &c)),
        ("freeze-count", freeze(&counted, &c)),
        ("login", login(&way(LoginWay::Provider { name: "Corp SSO".into(), start: "/login/start".into() }), &out)),
        (
            "login-once",
            login(
                &way(LoginWay::OneTime {
                    person: "Ana Ruiz".into(),
                    action: "/login/once".into(),
                    code: "4f8k".into(),
                }),
                &out,
            ),
        ),
        (
            "login-printed",
            login(&LoginView { way: LoginWay::Printed, notice: Some("That link was used already.".into()) }, &out),
        ),
        ("signed-out", signed_out(&out)),
        ("problem", problem(&bad, &c)),
        (
            "cli-login",
            cli_login_confirm(
                &CliLogin {
                    action: "/cli/confirm".into(),
                    code: "KXQ4-7M2P".into(),
                    from: "ana-laptop (127.0.0.1)".into(),
                    until: NOW.plus_secs(240),
                },
                &c,
            ),
        ),
    ]
}

/// Writes them where a browser can be pointed at: `python3 -m http.server` in `target/console-fixtures`.
#[test]
fn pages_are_written_for_looking_at() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../console-fixtures");
    std::fs::create_dir_all(folder.join("assets")).unwrap();
    for path in [css_path(), js_path(), icon_path()] {
        let (_, bytes) = asset(path.strip_prefix(ASSETS).unwrap()).unwrap();
        std::fs::write(folder.join(path.trim_start_matches('/')), bytes).unwrap();
    }
    for (name, html) in pages() {
        std::fs::write(folder.join(format!("{name}.html")), html).unwrap();
    }
}

#[test]
fn every_page_is_whole_bounded_and_fits_the_content_security_policy() {
    for (name, html) in pages() {
        assert!(html.len() <= PAGE_BYTES_MAX, "{name}: {} bytes", html.len());
        assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"), "{name}");
        for tag in tags(&html) {
            for never in [" style=", " onclick=", " onerror=", " onload=", " autofocus", " formaction="] {
                assert!(!tag.contains(never), "{name}: {tag}");
            }
            assert!(
                !tag.starts_with("<style") && !tag.starts_with("<iframe") && !tag.starts_with("<base"),
                "{name}: {tag}"
            );
            assert!(
                !tag.starts_with("<script") || tag == format!("<script src=\"{}\" defer>", js_path()),
                "{name}: {tag}"
            );
            if let Some(at) = tag.find("href=\"").or(tag.find("src=\"")).or(tag.find("action=\"")) {
                let address = tag[at..].split('"').nth(1).unwrap();
                assert!(
                    address.starts_with('/') && !address.starts_with("//") || address.starts_with('#'),
                    "{name}: {tag}"
                );
            }
        }
        assert_eq!(html.matches("<h1").count(), 1, "{name}");
        let levels = tags(&html).filter_map(|t| t.strip_prefix("<h")?.chars().next()?.to_digit(10));
        levels.fold(0, |last, level| {
            assert!(level <= last + 1, "{name}: h{level} after h{last}");
            level
        });
    }
    assert!(!CSP.contains("unsafe") && CSP.contains("frame-ancestors 'none'"));
}

/// P8: HTML, OSC 8, bidi, zero-width, tags, look-alikes in every field that an agent can reach.
#[test]
fn p8_nothing_from_an_agent_is_markup_or_hidden() {
    for state in ["pending", "active", "ending", "ended", "denied"] {
        let mut r = hostile();
        r.grant.state = state.into();
        let html = request(&r, &chrome(), Some(HOSTILE));
        assert!(html.len() <= PAGE_BYTES_MAX, "{state}: {}", html.len());
        assert_harmless(&html);
        assert!(html.contains("‹U+202E›txt.exe") && html.contains("‹U+001B›]8;;"), "{state}");
        assert!(html.contains("mixes Cyrillic and Latin letters"), "{state}");
    }
    let mut q = fixtures::queue();
    for r in q.mine.iter_mut().chain(&mut q.others).chain(&mut q.live).chain(&mut q.decided) {
        r.sentence = HOSTILE.into();
    }
    assert_harmless(&queue(&q, &chrome()));
}

/// Nothing of [`HOSTILE`] became a tag, and no character of it is there unseen.
fn assert_harmless(html: &str) {
    let tags: Vec<_> = tags(html).collect();
    assert!(!tags.iter().any(|t| t.contains("alert(1)") || t.contains("javascript:")), "{tags:?}");
    assert_eq!(tags.iter().filter(|t| t.starts_with("<script")).count(), 1);
    assert_eq!(tags.iter().filter(|t| t.starts_with("<img")).count(), 1);
    let unseen: Vec<_> = html.chars().filter(|c| *c != '\n' && visible::is_unseen(*c)).collect();
    assert!(unseen.is_empty(), "{unseen:?}");
}

/// P8: ten thousand lines, in each field at once: the page stays small, and what can't be read whole can't be approved.
#[test]
fn p8_ten_thousand_lines_are_bounded_and_what_is_cut_cannot_be_approved() {
    let flood = "<b>\"'&\u{202e}line\n".repeat(10_000);
    let mut r = hostile();
    r.intent.clone_from(&flood);
    let html = request(&r, &chrome(), None);
    assert!(html.len() <= PAGE_BYTES_MAX, "{}", html.len());
    assert!(html.contains("more characters)") && html.contains("value=\"approve\""));

    r.sentence.clone_from(&flood);
    r.identity.name.clone_from(&flood);
    r.identity.id.clone_from(&flood);
    r.identity.owner = Some(flood.clone());
    r.identity.attributes = (0..60).map(|n| (format!("{n}{flood}"), flood.clone())).collect();
    r.identity.chain = vec![flood.clone(); 60];
    r.reasons = vec![flood.clone(); 60];
    r.holds = vec![flood.clone(); 60];
    r.difference = Some(vec![flood.clone(); 60]);
    r.permissions = vec![r.permissions[0].clone(); 16];
    for p in &mut r.permissions {
        p.can = vec![flood.clone(); 50];
        p.irreversible = vec![flood.clone(); 50];
    }
    let first = r.timeline[0].clone();
    r.timeline = vec![first; 5000];
    r.leases = vec![r.leases[0].clone(); 60];
    for state in ["pending", "active", "ending", "ended"] {
        r.grant.state = state.into();
        let html = request(&r, &chrome(), Some(&flood));
        assert!(html.len() <= PAGE_BYTES_MAX, "{state}: {}", html.len());
        assert!(!html.contains("value=\"approve\""), "{state}");
        assert!(state != "pending" || html.contains("too long to be shown whole"));
        assert_eq!(html.matches("Revoke now").count(), 2 * usize::from(state == "active"));
    }
    let mut q = fixtures::queue();
    q.mine = vec![q.mine[0].clone(); 2000];
    q.decided = vec![q.decided[0].clone(); 2000];
    for r in q.mine.iter_mut().chain(&mut q.decided) {
        r.sentence.clone_from(&flood);
    }
    let html = queue(&q, &chrome());
    assert!(html.len() <= PAGE_BYTES_MAX, "{}", html.len());
}

/// P6: the addresses that forms post to are made of typed ids alone, and every form carries the session's token.
#[test]
fn p6_forms_post_to_us_with_the_sessions_token() {
    for (name, html) in pages() {
        for form in forms(&html) {
            assert!(form.starts_with("<form") && form.contains("method=\"post\""), "{name}: {form}");
            assert!(form.contains("name=\"csrf\" value=\""), "{name}: {form}");
        }
        assert!(!html.contains("method=\"get\""), "{name}");
    }
    let html = request(&hostile(), &chrome(), None);
    let address = format!("action=\"/grants/{}/vote\"", fixtures::id(9));
    assert_eq!(html.matches(&address).count(), 2);
}

/// CONSOLE.md: nothing is focused at load and Enter never approves, with or without the script.
#[test]
fn enter_never_approves() {
    for r in [fixtures::pending(), fixtures::pending_critical(), fixtures::pending_export()] {
        let html = request(&r, &chrome(), None);
        let approving: Vec<_> = forms(&html).into_iter().filter(|f| f.contains("value=\"approve\"")).collect();
        assert_eq!(approving.len(), 1);
        // HTML, 4.10.21.2 implicit submission: a disabled default button means that Enter submits nothing.
        let first = tags(&approving[0]).find(|t| t.starts_with("<button")).unwrap().to_owned();
        assert!(first.contains("disabled"), "{first}");
        let typed = approving[0].contains("name=\"typed\"");
        assert_eq!(typed, r.tier.as_ref().is_some_and(|t| t.friction == Friction::Critical));
    }
}

#[test]
fn the_request_page_keeps_its_order() {
    let html = request(&fixtures::pending(), &chrome(), None);
    let order = [
        "class=\"bar\"",
        "<h1",
        "id=\"h-can\"",
        "id=\"h-diff\"",
        "id=\"h-id\"",
        "id=\"h-words\"",
        "id=\"h-why\"",
        "id=\"h-similar\"",
        "id=\"h-decide\"",
        "Approve write for 15 min",
    ];
    let at: Vec<_> = order.iter().map(|o| html.find(o).unwrap_or_else(|| panic!("{o}"))).collect();
    assert!(at.is_sorted(), "{at:?}");
    assert!(html.contains("Written by the agent. Not verified."));
}

#[test]
fn who_cannot_decide_gets_no_form_and_the_reason() {
    let html = request(&fixtures::pending_not_mine(), &chrome(), None);
    assert!(!html.contains("/vote\"") && html.contains("You answer for this agent"));
    let mut r = fixtures::pending();
    r.digest = None;
    assert!(!request(&r, &chrome(), None).contains("/vote\""), "nothing to bind a vote to");
}

#[test]
fn tiers_differ_in_word_and_icon_not_in_colour_alone() {
    let bar = |r: Review| {
        let html = request(&r, &chrome(), None);
        let from = html.find("<span class=\"tier\">").unwrap();
        html[from..html[from..].find("<span class=\"meter\"").unwrap() + from].to_owned()
    };
    let bars = [bar(fixtures::pending_export()), bar(fixtures::pending()), bar(fixtures::pending_critical())];
    for (i, word) in ["export", "change", "critical"].iter().enumerate() {
        assert!(bars[i].contains(word));
        let drawing = bars[i].split("<path d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(bars.iter().filter(|b| b.contains(drawing)).count(), 1, "{word}");
    }
}

#[test]
fn what_is_stuck_is_in_plain_sight_with_its_last_error_and_next_try() {
    let html = request(&fixtures::stuck(), &chrome(), None);
    for part in [
        "not proven gone",
        "7 failed attempts",
        "connection refused",
        "Next try in 42 s",
        "seen at the target",
        "carla revoked it",
    ] {
        assert!(html.contains(part), "{part}");
    }
    let html = request(&fixtures::attested(), &chrome(), None);
    for part in
        ["not every credential is proven gone", "Ana Ruiz attests", "the cluster was &#60;deleted&#62;", "by a person"]
    {
        assert!(html.contains(part), "{part}");
    }
    assert!(
        !html.contains("Ended, every credential is proven gone") && !html.contains("Nothing of it is at the target")
    );
    let html = request(&fixtures::ended(), &chrome(), None);
    for part in [
        "no role with OID 48213",
        "It expired by itself",
        "sessions cut: 2",
        "reported by the agent",
        "seen at the target",
    ] {
        assert!(html.contains(part), "{part}");
    }
}

fn tags(html: &str) -> impl Iterator<Item = &str> {
    html.split('<').skip(1).map(|t| {
        let end = t.find('>').map_or(t.len(), |e| e + 1);
        // The slice with its `<`: both come from the same text.
        let start = t.as_ptr() as usize - html.as_ptr() as usize - 1;
        &html[start..start + 1 + end]
    })
}

fn forms(html: &str) -> Vec<String> {
    html.split("<form").skip(1).map(|f| format!("<form{}", f.split("</form>").next().unwrap_or(f))).collect()
}
