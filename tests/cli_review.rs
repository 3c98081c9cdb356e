//! What a reviewer reads in a terminal: the whole story, honest and hostile, with and without a terminal's width.

#[path = "console/fixtures.rs"]
#[allow(dead_code)] // the pages' tests use the rest
mod fixtures;
#[path = "console/hostile.rs"]
#[allow(dead_code)]
mod hostile;

use countersign::cli::review_text::{decision, inbox, story};
use countersign::cli::term::Look;
use countersign::wire::visible::is_unseen;

const PLAIN: Look = Look::PLAIN;

#[test]
fn a_decision_is_shown_with_what_it_rests_on() {
    let review = fixtures::pending();
    let text = decision(PLAIN, &review);
    for part in [
        "gr_",
        "pending",
        "tier change, 0 of 1 approval, at most 15 min",
        review.sentence.as_str(),
        "can           change rows of: invoices",
        "can't         change rows of: customers, payments",
        "when it ends",
        "unlike last time  + change rows of: invoices",
        "has already",
        "proved by   oidc",
        "In the agent's own words (nobody has checked them):\n| ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn what_cannot_be_undone_or_ended_stands_out() {
    let mut review = fixtures::pending_critical();
    let text = decision(PLAIN, &review);
    assert!(text.contains("irreversible"), "{text}");
    review.permissions[0].residual_secs = 905;
    assert!(
        decision(PLAIN, &review).contains("a stolen copy works 16 min longer at most"),
        "never told shorter than it is"
    );
    review.permissions[0].residual_secs = (1 << 53) - 1;
    assert!(decision(PLAIN, &review).contains("nothing bounds how long a stolen copy works"));
    let text = decision(PLAIN, &fixtures::pending_not_mine());
    assert!(text.contains("you can't vote"), "{text}");
}

#[test]
fn the_story_has_votes_credentials_evidence_and_whose_word_each_line_is() {
    let text = story(PLAIN, &fixtures::ended());
    for part in [
        "ended",
        "Votes",
        "approved",
        "credential for",
        "proof",
        "What happened",
        "reported by the agent",
        "seen at the target",
        "digest ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = story(PLAIN, &fixtures::stuck());
    assert!(text.contains("without success"), "what will not die says so: {text}");
}

#[test]
fn the_inbox_has_what_waits_and_what_is_frozen() {
    let text = inbox(PLAIN, &fixtures::queue());
    for part in [
        "FROZEN: agent spiffe://corp.example/agents/importer, by Carla Moreau: “It loops.”",
        "countersign freeze --lift 3",
        "For you to decide",
        "Waiting for others",
        "In force, or ending",
        "Decided",
        "1/2",
        "2 min 51 s",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(
        inbox(PLAIN, &countersign::wire::reviewer::Queue::default()),
        "nothing waits, and nothing is in force\n"
    );
}

#[test]
fn nothing_hostile_reaches_the_terminal() {
    let mut queue = fixtures::queue();
    for row in &mut queue.mine {
        row.sentence = hostile::HOSTILE.to_owned();
    }
    queue.freezes[0].reason = hostile::HOSTILE.to_owned();
    for text in [story(PLAIN, &hostile::hostile()), inbox(PLAIN, &queue)] {
        let bad: Vec<char> = text.chars().filter(|c| *c != '\n' && is_unseen(*c)).collect();
        assert!(bad.is_empty(), "{bad:?}: {text}");
        assert!(text.contains("<U+001B>[2J") && text.contains("<U+202E>"), "{text}");
    }
    // The agent's lines stand behind a mark, so that none can be taken for ours.
    let text = story(PLAIN, &hostile::hostile());
    for line in ["| Approved by Ana, see below.", "| Tier: observe", "| Nothing to see"] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
    for line in ["Tier: observe", "Nothing to see", "Approved by Ana, see below."] {
        assert!(!text.lines().any(|l| l == line), "{line}");
    }
    assert!(text.contains("hidden or direction-changing characters"), "{text}");
}
