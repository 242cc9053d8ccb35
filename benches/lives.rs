// SPDX-License-Identifier: Apache-2.0
//! Flows that live without a kernel: what both kinds of benches drive.

use weir::flow::{Can, Flow, Ops, Rules, Segments};
use weir::op::{BufferId, Completion, Op, Segment, Side};
use weir::profile::Profile;

/// A worker's flows without a worker: the answers of a kernel that always has room.
pub(crate) struct Lives {
    ops: Ops,
    rules: Rules,
    segments: Segments,
}

impl Lives {
    /// With the default profile.
    pub(crate) fn new() -> Lives {
        let profile = Profile::default();
        Lives {
            ops: Ops::new(),
            rules: Rules::new(&profile, Can { forward: false, splice: true }),
            segments: Segments::new(8),
        }
    }

    /// Accepted and connected.
    pub(crate) fn open(&mut self) -> Flow {
        let mut flow = Flow::open(None, &self.rules, &mut self.segments, &mut self.ops);
        self.step(&mut flow, Completion::Connected(Ok(())));
        flow
    }

    /// A message from each side, received and sent on. Operations asked for.
    pub(crate) fn exchange(&mut self, flow: &mut Flow) -> usize {
        Side::BOTH.into_iter().map(|side| self.message(flow, side)).sum()
    }

    /// Both sides end, and so does the flow.
    pub(crate) fn end(&mut self, flow: &mut Flow) -> usize {
        let mut asked = 0;
        for side in Side::BOTH {
            asked += self.step(flow, Completion::Received { side, result: Ok(None), more: false });
            if flow.closed().is_none() {
                let side = side.other();
                asked += self.step(flow, Completion::ShutDown { side, result: Ok(()) });
            }
        }
        assert!(flow.closed().is_some(), "both sides have ended");
        asked
    }

    fn message(&mut self, flow: &mut Flow, side: Side) -> usize {
        let segment = Segment { buffer: BufferId(side as u16), offset: 0, len: 64 };
        let received = Completion::Received { side, result: Ok(Some(segment)), more: true };
        let asked = self.step(flow, received);
        asked + self.step(flow, Completion::Sent { from: side, result: Ok(64) })
    }

    fn step(&mut self, flow: &mut Flow, completion: Completion) -> usize {
        flow.step(completion, &self.rules, &mut self.segments, &mut self.ops);
        while self.segments.take_freed().is_some() {}
        self.ops.drain().filter(|op| !matches!(op, Op::AwaitBuffers(_))).count()
    }
}
