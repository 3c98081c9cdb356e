//! `/metrics`, on a listener of its own. Labels name no agents (DESIGN section 9).

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::core::grant::{Grant, GrantState};
use crate::core::lease::LeaseState;

use super::Shared;

/// The recorder of one broker.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
}

impl Default for Metrics {
    fn default() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        Self { recorder: Arc::new(recorder), handle }
    }
}

impl Metrics {
    /// A request was decided or waits.
    pub fn requested(&self, grant: &Grant) {
        let tier = grant.assessed.as_ref().map_or("none", |a| a.approvable.tier.name.as_str()).to_owned();
        metrics::with_local_recorder(&*self.recorder, || {
            counter!("countersign_requests_total", "tier" => tier, "state" => grant.state.word()).increment(1);
        });
    }
    /// Credentials were asked for.
    pub fn minted(&self, ok: bool) {
        metrics::with_local_recorder(&*self.recorder, || {
            counter!("countersign_credentials_total", "outcome" => if ok { "ok" } else { "refused" }).increment(1);
        });
    }
    /// A reviewer voted.
    pub fn voted(&self, verdict: &'static str) {
        metrics::with_local_recorder(&*self.recorder, || {
            counter!("countersign_votes_total", "verdict" => verdict).increment(1);
        });
    }

    async fn render(&self, app: &Shared) -> String {
        let now = app.broker.now();
        let (mut pending, mut active, mut ending, mut revoking, mut unknown, mut oldest) =
            (0u32, 0u32, 0u32, 0u32, 0u32, 0u64);
        for grant in app.broker.store.open_grants().await.unwrap_or_default() {
            match grant.state {
                GrantState::Pending { .. } => pending += 1,
                GrantState::Active { .. } => active += 1,
                GrantState::Ending { .. } => ending += 1,
                _ => {}
            }
            for lease in grant.open_leases() {
                match &lease.state {
                    LeaseState::Revoking { since, .. } => {
                        revoking += 1;
                        oldest = oldest.max(now.ms_since(*since) / 1000);
                    }
                    LeaseState::Unknown { .. } => unknown += 1,
                    _ => {}
                }
            }
        }
        let (figures, targets) = (app.broker.store.figures(), app.broker.target_figures());
        let writable = app.broker.store.is_writable();
        metrics::with_local_recorder(&*self.recorder, || {
            gauge!("countersign_grants", "state" => "pending").set(pending);
            gauge!("countersign_grants", "state" => "active").set(active);
            gauge!("countersign_grants", "state" => "ending").set(ending);
            gauge!("countersign_leases_revoking").set(revoking);
            gauge!("countersign_leases_unknown").set(unknown);
            #[allow(clippy::cast_precision_loss)] // seconds
            gauge!("countersign_leases_revoking_oldest_seconds").set(oldest as f64);
            for (target, figures) in targets {
                let away = if figures.is_away { 1.0 } else { 0.0 };
                gauge!("countersign_target_away", "target" => target.to_string()).set(away);
                counter!("countersign_target_probes_total", "target" => target.to_string()).absolute(figures.probes);
            }
            gauge!("countersign_journal_writable").set(if writable { 1.0 } else { 0.0 });
            for (name, value) in figures {
                #[allow(clippy::cast_precision_loss)] // counters of one run
                gauge!("countersign_store", "figure" => name).set(value as f64);
            }
        });
        self.handle.render()
    }
}

/// Routes of the metrics listener.
pub fn routes(app: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(super::agent_api::healthz))
        .route("/readyz", get(super::agent_api::readyz))
        .fallback(super::agent_api::nothing)
        .method_not_allowed_fallback(super::agent_api::another_method)
        .with_state(app)
}

async fn metrics_page(State(app): State<Shared>) -> String {
    app.metrics.render(&app).await
}
