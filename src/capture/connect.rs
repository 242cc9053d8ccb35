// SPDX-License-Identifier: Apache-2.0
//! The connect hook's part of the table: its flows over loopback are not tracked.

use super::nft::{Draft, Hook};
use crate::bpf::HookPlan;

/// What goes to and comes from our port over loopback, told by the port.
pub(super) fn untracked(draft: &mut Draft, hook: &HookPlan) {
    for side in ["dport", "sport"] {
        let port = hook.port;
        draft.rule(Hook::Output, format!("oif lo tcp {side} {port} counter notrack accept"));
    }
    // It arrives as it left, and no socket need be looked up for it.
    draft.first(Hook::Prerouting, format!("iif lo tcp dport {} accept", hook.port));
}
