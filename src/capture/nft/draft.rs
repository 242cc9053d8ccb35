// SPDX-License-Identifier: Apache-2.0
//! The table in the making: every way of capture adds its rules, and one text comes out.

use std::fmt::Write as _;

/// Rules by chain, in the order in which they were added.
#[derive(Debug, Default)]
pub(in crate::capture) struct Draft {
    hooked: [Vec<String>; Hook::ALL.len()],
    /// Chains that are wanted although they may have no rule.
    kept: Vec<Hook>,
    named: Vec<Chain>,
    /// Sets and counters.
    objects: Vec<String>,
    /// Packets may get another route in the output hook, which needs a chain of that type.
    reroutes: bool,
}

#[derive(Debug)]
struct Chain {
    name: String,
    rules: Vec<String>,
    takes: bool,
}

/// Where packets meet a chain. The raw priority is before connection tracking.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(in crate::capture) enum Hook {
    Prerouting,
    Output,
    PreroutingNat,
    OutputNat,
    Input,
}

impl Hook {
    const ALL: [Hook; 5] =
        [Hook::Prerouting, Hook::Output, Hook::PreroutingNat, Hook::OutputNat, Hook::Input];

    /// Its chain's name and head. `dstnat` is a word for prerouting only, and stands for -100; what
    /// looks at translations in input comes after `srcnat`, which is 100.
    const fn chain(self, reroutes: bool) -> (&'static str, &'static str) {
        match self {
            Hook::Prerouting => ("prerouting", "type filter hook prerouting priority raw"),
            // A chain's type stays as it was made, so this is another one.
            Hook::Output if reroutes => ("output_route", "type route hook output priority raw"),
            Hook::Output => ("output", "type filter hook output priority raw"),
            Hook::PreroutingNat => ("prerouting_nat", "type nat hook prerouting priority dstnat"),
            Hook::OutputNat => ("output_nat", "type nat hook output priority -100"),
            Hook::Input => ("input", "type filter hook input priority 110"),
        }
    }
}

impl Draft {
    /// The next rule of a hooked chain.
    pub(in crate::capture) fn rule(&mut self, hook: Hook, rule: impl Into<String>) {
        if let Some(rules) = self.hooked.get_mut(hook as usize) {
            rules.push(rule.into());
        }
    }

    /// A rule that comes before those that are there.
    pub(in crate::capture) fn first(&mut self, hook: Hook, rule: impl Into<String>) {
        if let Some(rules) = self.hooked.get_mut(hook as usize) {
            rules.insert(0, rule.into());
        }
    }

    /// The chain is there, with rules or without.
    pub(in crate::capture) fn keep(&mut self, hook: Hook) {
        self.kept.push(hook);
    }

    /// Hooked chains and their rules.
    fn hooked(&self) -> impl Iterator<Item = (&Hook, &Vec<String>)> {
        let all = Hook::ALL.iter().zip(&self.hooked);
        all.filter(|(hook, rules)| !rules.is_empty() || self.kept.contains(hook))
    }

    /// A chain that rules jump to.
    pub(in crate::capture) fn chain(&mut self, name: &str, rules: Vec<String>) {
        self.named.push(Chain { name: name.to_owned(), rules, takes: false });
    }

    /// A chain that decides what is taken: empty, and nothing more is.
    pub(in crate::capture) fn taking(&mut self, name: &str, rules: Vec<String>) {
        self.named.push(Chain { name: name.to_owned(), rules, takes: true });
    }

    /// A set or a counter, once however many ask for it.
    pub(in crate::capture) fn object(&mut self, object: impl Into<String>) {
        let object = object.into();
        if !self.objects.contains(&object) {
            self.objects.push(object);
        }
    }

    /// The output chain gives packets marks that change their route.
    pub(in crate::capture) fn reroute(&mut self) {
        self.reroutes = true;
    }

    /// The whole table.
    pub(in crate::capture) fn table(&self) -> String {
        let mut text = String::from("table inet weir {\n\tflags owner\n");
        for object in &self.objects {
            push(&mut text, &format!("\n\t{object}"));
        }
        for Chain { name, rules, .. } in &self.named {
            push(&mut text, &format!("\n\tchain {name} {{"));
            push_rules(&mut text, rules);
        }
        for (hook, rules) in self.hooked() {
            let (name, head) = hook.chain(self.reroutes);
            push(&mut text, &format!("\n\tchain {name} {{\n\t\t{head}; policy accept;"));
            push_rules(&mut text, rules);
        }
        text.push_str("}\n");
        text
    }

    /// Every chain, by its name.
    pub(super) fn chains(&self) -> Vec<String> {
        let hooked = self.hooked().map(|(hook, _)| hook.chain(self.reroutes).0.to_owned());
        hooked.chain(self.named.iter().map(|chain| chain.name.clone())).collect()
    }

    /// Takes nothing more, and makes a chain by which others can see that it was done.
    pub(super) fn stop(&self) -> String {
        let mut text = String::new();
        for chain in self.named.iter().filter(|chain| chain.takes) {
            push(&mut text, &format!("flush chain inet weir {}", chain.name));
        }
        push(&mut text, &format!("add chain inet weir {STOPPED}"));
        text
    }
}

fn push_rules(text: &mut String, rules: &[String]) {
    for rule in rules {
        push(text, &format!("\t\t{rule}"));
    }
    push(text, "\t}");
}

fn push(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

/// The empty chain that says that nothing more is taken.
pub(super) const STOPPED: &str = "stopped";
