// SPDX-License-Identifier: Apache-2.0
//! One task for each service that is subscribed to, for each life of its subscription.

use std::collections::BTreeMap;

use tokio::task::{AbortHandle, JoinSet};

use crate::takeover::link::{Life, Link};

/// All of them; they end with it.
#[derive(Debug, Default)]
pub(super) struct Followers {
    by_service: BTreeMap<String, (Life, AbortHandle)>,
    tasks: JoinSet<()>,
}

impl Followers {
    /// Starts who is missing with `start`, and ends who is wanted no more.
    pub(super) fn follow<T>(&mut self, link: &Link, start: impl Fn(String) -> T)
    where
        T: Future<Output = ()> + Send + 'static,
    {
        let wanted = link.subscribed();
        self.by_service.retain(|service, (life, task)| {
            let is_wanted = wanted.get(service) == Some(life);
            if !is_wanted {
                task.abort();
            }
            is_wanted
        });
        while self.tasks.try_join_next().is_some() {}
        for (service, life) in wanted {
            let tasks = &mut self.tasks;
            let begin = || (life, tasks.spawn(start(service.clone())));
            self.by_service.entry(service.clone()).or_insert_with(begin);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use super::*;
    use crate::takeover::link::{Backend, Remote};
    use crate::takeover::{Registry, Snapshot};

    /// Never says anything by itself.
    struct Silent;

    impl Backend for Silent {
        type Failure = &'static str;

        async fn session(&mut self, _: &Arc<Link>) -> Result<Infallible, &'static str> {
            std::future::pending().await
        }
    }

    /// A consumer that leaves and comes back while the registry does not answer hears where the
    /// service lives, although nothing has changed there.
    #[tokio::test]
    async fn who_subscribes_again_hears_again() {
        let mut followers = Followers::default();
        let mut remote = Remote::spawn("main", None, Silent);
        let link = remote.link();
        let say = |service: String| {
            let link = Arc::clone(&link);
            async move {
                link.note_snapshot(Snapshot { providers: vec![], revision: 1, service });
                std::future::pending::<()>().await;
            }
        };
        for round in 1..=2 {
            remote.subscribe("a");
            for _ in 0..2 {
                followers.follow(&link, say);
                tokio::task::yield_now().await;
            }
            let heard = remote.news();
            assert_eq!(heard.len(), 1, "round {round}: {heard:?}");
            remote.unsubscribe("a");
        }
        followers.follow(&link, say);
        assert!(followers.by_service.is_empty());
    }
}
