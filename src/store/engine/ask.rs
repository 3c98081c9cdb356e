//! Questions that memory alone answers, as the head has it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Inner;
use crate::core::grant::Grant;
use crate::core::id::{GrantId, LeaseId, TaskKey};
use crate::store::view::task_key;

impl Inner {
    /// A grant in memory, as the head has it.
    pub(in crate::store) fn standing(&self, id: GrantId) -> Option<&Arc<Grant>> {
        self.head.get(id).or_else(|| self.view.get(id).map(|s| &s.grant))
    }

    /// Open grants among these, as the head has them.
    fn open_among(&self, ids: BTreeSet<GrantId>) -> impl Iterator<Item = Arc<Grant>> {
        ids.into_iter().filter_map(|id| self.standing(id)).filter(|g| !g.state.is_final()).cloned()
    }

    /// See [`crate::store::Store::subtree`]. `root` is the grant as it was looked up before; it may be in no memory.
    pub(in crate::store) fn subtree(&self, id: GrantId, root: Option<Arc<Grant>>) -> Vec<Arc<Grant>> {
        // What is below is open, so it is in memory; the root may have changed since it was looked up.
        let root = self.standing(id).cloned().or(root);
        let mut out: Vec<Arc<Grant>> = root.into_iter().collect();
        let mut seen: BTreeSet<GrantId> = BTreeSet::from([id]);
        let mut next = 0;
        while let Some(parent) = out.get(next).map(|g| g.id) {
            next += 1;
            let children = self.children(parent).into_iter().filter(|c| seen.insert(*c)).collect();
            out.extend(self.open_among(children));
        }
        out
    }

    /// See [`crate::store::Store::task_grants`].
    pub(in crate::store) fn task_grants(&self, task: &TaskKey) -> Vec<Arc<Grant>> {
        let coming = self.head.grants().filter(|g| task_key(g) == *task).map(|g| g.id);
        let ids = self.view.of_task(task).chain(coming).collect();
        self.open_among(ids).collect()
    }

    /// See [`crate::store::Store::task_links`].
    pub(in crate::store) fn task_links(&self, task: &TaskKey) -> Vec<GrantId> {
        let of_task = |id: &GrantId| self.standing(*id).is_some_and(|g| task_key(g) == *task);
        let coming = self.head.grants().filter_map(|g| Some((g.id, g.request.parent?)));
        let coming = coming.flat_map(|(child, parent)| [child, parent]).filter(of_task);
        let links: BTreeSet<GrantId> = self.view.links(task).chain(coming).collect();
        links.into_iter().collect()
    }

    /// See [`crate::store::Store::lease_named`].
    pub(in crate::store) fn lease_named(&self, name: &str) -> Option<(GrantId, LeaseId)> {
        let named = |g: &Arc<Grant>| g.open_leases().find(|l| l.intent.name == name).map(|l| (g.id, l.intent.lease));
        self.view.lease_named(name).or_else(|| self.head.grants().find_map(named))
    }
}
