// SPDX-License-Identifier: Apache-2.0
//! How other frameworks write services into a registry's tree: a directory for each interface, and
//! in it one leaf for each provider, whose name is a URL.
//!
//! Pure. The same service and provider always make the same leaf, so who publishes again finds its
//! own; what stands there and is no provider of the service is left out, never guessed.

use super::{Provider, Snapshot};
use crate::config::{Layout, Tree};

/// A service, as both frameworks split its name.
struct Key<'a> {
    interface: &'a str,
    unique: &'a str,
    version: Option<&'a str>,
}

impl Tree {
    /// Where the providers of `service` stand.
    pub(super) fn directory(&self, service: &str) -> String {
        self.layout.directory(&self.root, service)
    }

    /// Where `provider` does.
    pub(super) fn path(&self, service: &str, provider: &Provider) -> String {
        format!("{}/{}", self.directory(service), self.layout.leaf(service, provider))
    }

    /// What these `leaves` of its directory say.
    pub(super) fn snapshot<'a>(
        &self,
        service: &str,
        leaves: impl IntoIterator<Item = &'a str>,
        revision: i64,
    ) -> Snapshot {
        let leaves = leaves.into_iter();
        let mut providers: Vec<Provider> =
            leaves.filter_map(|leaf| self.layout.provider(service, leaf)).collect();
        providers.sort_by_key(|provider| provider.endpoint.addr);
        providers.dedup_by_key(|provider| provider.endpoint.addr);
        let revision = u64::try_from(revision).unwrap_or(0);
        Snapshot { providers, revision, service: service.to_owned() }
    }
}

impl Layout {
    /// Where the providers of `service` stand, below `root`.
    pub(super) fn directory(self, root: &str, service: &str) -> String {
        format!("{root}/{}/providers", encoded(Key::of(service).interface))
    }

    /// How `provider` stands there.
    pub(super) fn leaf(self, service: &str, provider: &Provider) -> String {
        let key = Key::of(service);
        let (path, version) = match self {
            Layout::Dubbo => (format!("/{}", key.interface), key.version.unwrap_or("")),
            Layout::Sofa => (String::new(), key.version.unwrap_or(SOFA_VERSION)),
        };
        let weight = provider.endpoint.weight.to_string();
        let usual: &[(&str, &str)] = match self {
            Layout::Dubbo => &[
                ("application", "weir"),
                ("dubbo", "2.0.2"),
                ("dynamic", "true"),
                ("interface", key.interface),
                ("serialization", "hessian2"),
                ("side", "provider"),
                ("version", version),
                ("weight", &weight),
            ],
            Layout::Sofa => &[
                ("dynamic", "true"),
                ("group", "SOFA"),
                ("interface", key.interface),
                ("serialization", "hessian2"),
                ("uniqueId", key.unique),
                ("version", version),
                ("weight", &weight),
            ],
        };
        let mut url = format!("{}://{}{path}", self.scheme(), provider.endpoint.addr);
        let said = |key: &str| value(&provider.parameters, key).is_some();
        let more = usual.iter().filter(|(key, value)| !value.is_empty() && !said(key));
        let mut mark = '?';
        let own = Some(provider.parameters.clone()).filter(|text| !text.is_empty());
        for pair in own.into_iter().chain(more.map(|(key, value)| format!("{key}={value}"))) {
            url.push(mark);
            url.push_str(&pair);
            mark = '&';
        }
        encoded(&url)
    }

    /// The protocol that its calls speak where many services share a port.
    pub(super) fn scheme(self) -> &'static str {
        match self {
            Layout::Dubbo => "dubbo",
            Layout::Sofa => "bolt",
        }
    }

    /// Calls to the provider `url` name the service of `interface` where weir reads them.
    pub(super) fn is_routable(self, interface: &str, url: &str) -> bool {
        if self == Layout::Sofa {
            return true;
        }
        let (place, parameters) = url.split_once('?').unwrap_or((url, ""));
        let path = place.split_once("://").and_then(|(_, place)| place.split_once('/'));
        // A caller takes the first that it has, and Hessian2 where none is named.
        let prefers =
            value(parameters, "prefer.serialization").or(value(parameters, "serialization"));
        let first = prefers.and_then(|list| list.split(',').next()).unwrap_or_default().trim();
        path.is_some_and(|(_, path)| path == interface)
            && matches!(first, "" | "hessian2" | "native-hessian")
    }

    /// Which of several providers of a service `url` is to its callers; empty if it is any.
    pub(super) fn group_of(self, url: &str) -> &str {
        let parameters = url.split_once('?').map_or("", |(_, parameters)| parameters);
        match self {
            Layout::Dubbo => value(parameters, "group").unwrap_or_default(),
            // Every provider says the same.
            Layout::Sofa => "",
        }
    }

    /// The service that `leaf` provides in the directory of `interface`, as calls name it.
    pub(super) fn service_of(self, interface: &str, leaf: &str) -> Option<String> {
        let text = decoded(leaf)?;
        let parameters = text.split_once('?').map_or("", |(_, parameters)| parameters);
        let said = |name: &str| value(parameters, name).unwrap_or("");
        let service = match (self, said("version"), said("uniqueId")) {
            (Layout::Dubbo, "" | "0.0.0", _) => interface.to_owned(),
            (Layout::Dubbo, version, _) => format!("{interface}:{version}"),
            (Layout::Sofa, "", "") => format!("{interface}:{SOFA_VERSION}"),
            (Layout::Sofa, version, "") => format!("{interface}:{version}"),
            (Layout::Sofa, "", unique) => format!("{interface}:{SOFA_VERSION}:{unique}"),
            (Layout::Sofa, version, unique) => format!("{interface}:{version}:{unique}"),
        };
        self.provider(&service, leaf).map(|_| service)
    }

    /// The provider that `leaf` is, if it provides `service` and may be called.
    pub(super) fn provider(self, service: &str, leaf: &str) -> Option<Provider> {
        let provider = Provider::parse(&decoded(leaf)?)?;
        let key = Key::of(service);
        let said = |name: &str| value(&provider.parameters, name).unwrap_or("");
        let is_it = match self {
            Layout::Dubbo => {
                is_version(key.version.unwrap_or(""), said("version"))
                    && matches!(said("category"), "" | "providers")
                    && said("enabled") != "false"
                    && said("disabled") != "true"
            }
            Layout::Sofa => {
                let version = Some(said("version")).filter(|version| !version.is_empty());
                version.unwrap_or(SOFA_VERSION) == key.version.unwrap_or(SOFA_VERSION)
                    && said("uniqueId") == key.unique
            }
        };
        is_it.then_some(provider)
    }
}

impl Key<'_> {
    fn of(service: &str) -> Key<'_> {
        let mut parts = service.splitn(3, ':');
        Key {
            interface: parts.next().unwrap_or_default(),
            version: parts.next(),
            unique: parts.next().unwrap_or_default(),
        }
    }
}

/// Dubbo has three ways to say that there is no version, and one for any.
fn is_version(wanted: &str, said: &str) -> bool {
    let none = |version: &str| matches!(version, "" | "0.0.0");
    wanted == "*" || wanted == said || (none(wanted) && none(said))
}

fn value<'a>(parameters: &'a str, key: &str) -> Option<&'a str> {
    let mut pairs = parameters.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// As one part of a path: everything but letters, digits and `-._~*` is written as `%XX`.
pub(super) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~*".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The reverse; Java writes a space as `+`.
pub(super) fn decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        out.push(match byte {
            b'%' => u8::try_from(digit(bytes.next())? * 16 + digit(bytes.next())?).ok()?,
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8(out).ok()
}

/// Of a service that names none.
const SOFA_VERSION: &str = "1.0";

#[cfg(test)]
mod tests {
    use super::*;

    fn provider(text: &str) -> Provider {
        Provider::parse(text).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again() {
        for (layout, service) in [
            (Layout::Sofa, "com.a.Demo:1.0"),
            (Layout::Sofa, "com.a.Demo:2.0:blue"),
            (Layout::Dubbo, "com.a.Demo"),
            (Layout::Dubbo, "com.a.Demo:1.0.0"),
        ] {
            let leaf = layout.leaf(service, &provider("10.0.0.7:20881?p=1&[plus]=[timeout#3]"));
            assert!(!leaf.contains(['/', '?', '&']), "{leaf}");
            let read = layout.provider(service, &leaf).unwrap();
            assert_eq!(read.endpoint.addr, "10.0.0.7:20881".parse().unwrap());
            assert!(read.parameters.starts_with("p=1&[plus]=[timeout#3]&"), "{}", read.parameters);
            assert_eq!(layout.provider("com.a.Demo:3.0", &leaf), None, "another version");
        }
    }

    /// Leaves as SOFARPC's and Dubbo's own clients write them.
    #[test]
    fn leaves_of_other_frameworks_are_read() {
        let sofa = "bolt%3A%2F%2F10.0.0.5%3A12200%3FstartTime%3D1%26uniqueId%3D%26weight%3D30%26interface%3Dcom.a.Demo%26version%3D1.0%26group%3DSOFA";
        let read = Layout::Sofa.provider("com.a.Demo:1.0", sofa).unwrap();
        assert_eq!((read.endpoint.addr.port(), read.endpoint.weight), (12200, 30));
        let dubbo = "dubbo%3A%2F%2F10.0.0.5%3A20880%2Fcom.a.Demo%3Fanyhost%3Dtrue%26version%3D0.0.0%26side%3Dprovider";
        assert!(Layout::Dubbo.provider("com.a.Demo", dubbo).is_some());
        assert!(Layout::Dubbo.provider("com.a.Demo:1.0", dubbo).is_none());
        for wrong in ["", "%", "%zz", "bolt%3A%2F%2Fhost%3A1", "%ff"] {
            assert_eq!(Layout::Sofa.provider("com.a.Demo:1.0", wrong), None, "{wrong}");
        }
        let off = "dubbo%3A%2F%2F10.0.0.5%3A20880%2Fcom.a.Demo%3Fenabled%3Dfalse";
        assert!(Layout::Dubbo.provider("com.a.Demo", off).is_none());
    }

    #[test]
    fn directories_are_those_of_the_frameworks() {
        assert_eq!(
            Layout::Sofa.directory("/sofa-rpc", "com.a.Demo:1.0"),
            "/sofa-rpc/com.a.Demo/providers"
        );
        assert_eq!(Layout::Dubbo.directory("/dubbo", "com.a.Demo"), "/dubbo/com.a.Demo/providers");
    }
}
