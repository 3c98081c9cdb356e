//! What every store must do, against the trait alone: the memory store and the embedded one pass it here, the next
//! implementation adds a [`House`] and a line in [`suite`].
#![allow(clippy::cast_possible_truncation, clippy::type_complexity, clippy::redundant_pattern_matching)] // tests

mod appends;
mod histories;
pub(super) mod kit;
mod oracle;
mod queries;
mod reopening;
mod work;

use std::sync::Arc;

use super::{Store, embedded, memory};

/// A place where a store lives: opens it, and opens it again after it was closed.
trait House: Send + Sync {
    fn open(&self) -> Arc<dyn Store>;
}

#[derive(Default)]
struct MemoryHouse(memory::MemoryLog);

impl House for MemoryHouse {
    fn open(&self) -> Arc<dyn Store> {
        Arc::new(memory::reopen(self.0.clone()).expect("what was written can be read"))
    }
}

struct EmbeddedHouse(tempfile::TempDir);

impl Default for EmbeddedHouse {
    fn default() -> Self {
        Self(tempfile::tempdir().expect("a folder for the test"))
    }
}

impl House for EmbeddedHouse {
    fn open(&self) -> Arc<dyn Store> {
        let clock = Arc::new(crate::time::SystemClock);
        let (store, report) = embedded::open(self.0.path(), clock, None, Vec::new()).expect("the store opens");
        assert_eq!((report.rebuilt, report.cut), (None, None));
        Arc::new(store)
    }
}

/// Each test once for each store.
macro_rules! suite {
    ($($file:ident: $($name:ident)*;)*) => {
        mod on_memory {
            use super::*;
            $($(#[tokio::test] async fn $name() { $file::$name(&MemoryHouse::default()).await; })*)*
        }
        mod on_embedded {
            use super::*;
            $($(#[tokio::test] async fn $name() { $file::$name(&EmbeddedHouse::default()).await; })*)*
        }
    };
}

suite! {
    appends:
        all_or_nothing numbers_go_on_without_gaps versions_are_compared grants_that_are_only_read_are_compared
        a_completed_task_takes_no_more a_task_is_completed_with_the_last_of_its_grants
        open_grants_are_counted_with_what_is_on_its_way freezes_are_compared one_grant_for_one_idempotency_digest
        two_twins_on_their_way children_end_with_their_parent many_at_once_in_order limits_of_a_batch
        a_caller_that_goes_away_changes_nothing;
    queries:
        the_head_is_ahead_of_what_is_durable waiting_for_a_change waiters_leave_nothing_behind
        a_tree_parents_first grants_of_a_task counts_of_an_agent decided_latest_first known_by_its_idempotency_digest
        what_is_held_within_the_window what_the_owners_agents_hold what_only_one_grant_gave
        three_grants_of_one_permission what_a_task_held history_of_an_agent freezes_that_hold leases_by_name events_of_a_grant
        figures_and_the_last_run;
    work:
        due_in_order_and_once a_claim_comes_back a_claim_is_void_after_an_event other_leases_keep_their_claims
        waiting_for_what_is_due giving_back_what_is_not_claimed;
    reopening:
        everything_is_as_before a_freeze_epoch_is_never_used_twice closed_is_closed;
}
