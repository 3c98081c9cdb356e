//! What every store must do, against the trait alone. `conforms.rs` runs it on the memory store and the embedded one,
//! `tests/store_postgres.rs` on PostgreSQL: each has a [`House`] and lets [`suite`] name the tests.
#![allow(clippy::cast_possible_truncation, clippy::type_complexity, clippy::redundant_pattern_matching)] // tests

pub mod appends;
pub mod histories;
pub mod kit;
pub mod oracle;
pub mod queries;
pub mod reopening;
pub mod work;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::Store;

/// A place where a store lives: opens it, and opens it again after it was closed.
#[async_trait]
pub trait House: Send + Sync {
    /// Opens the store.
    async fn open(&self) -> Arc<dyn Store>;
    /// Until this is dropped, nothing more becomes durable. Where nothing does before the caller yields, that is so by
    /// itself.
    async fn hold(&self) -> Box<dyn Any + Send> {
        Box::new(())
    }
    /// So much time passes: for a store that has a clock of its own for what it hands out.
    async fn passes(&self, _time: Duration) {}
}

/// Each test once, in a house of its own.
macro_rules! suite {
    ($house:ty) => {
        suite! { $house;
            appends:
                all_or_nothing numbers_go_on_without_gaps versions_are_compared grants_that_are_only_read_are_compared
                a_completed_task_takes_no_more a_task_is_completed_with_the_last_of_its_grants
                open_grants_are_counted_with_what_is_on_its_way freezes_are_compared one_grant_for_one_idempotency_digest
                two_twins_on_their_way children_end_with_their_parent many_at_once_in_order limits_of_a_batch
                a_caller_that_goes_away_changes_nothing;
            queries:
                the_head_is_ahead_of_what_is_durable waiting_for_a_change waiters_leave_nothing_behind
                a_tree_parents_first grants_of_a_task counts_of_an_agent decided_latest_first
                known_by_its_idempotency_digest what_is_held_within_the_window what_the_owners_agents_hold
                what_only_one_grant_gave three_grants_of_one_permission what_a_task_held history_of_an_agent
                freezes_that_hold leases_by_name events_of_a_grant figures_and_the_last_run;
            work:
                due_in_order_and_once a_claim_comes_back a_claim_is_void_after_an_event other_leases_keep_their_claims
                what_was_frozen_goes_first waiting_for_what_is_due giving_back_what_is_not_claimed;
            reopening:
                everything_is_as_before a_freeze_epoch_is_never_used_twice closed_is_closed what_a_run_left_half_way;
        }
    };
    ($house:ty; $($file:ident: $($name:ident)*;)*) => {
        $($(#[tokio::test] async fn $name() { conformance::$file::$name(&<$house>::default()).await; })*)*
    };
}
pub(crate) use suite;
