// SPDX-License-Identifier: Apache-2.0
//! Certificates of an authority of the test's own, by openssl.

use std::path::PathBuf;

use tempfile::TempDir;

use super::run;

/// It vouches for whoever asks.
pub(crate) struct Authority(TempDir);

impl Authority {
    pub(crate) fn new(name: &str) -> Authority {
        let authority = Authority(TempDir::new().unwrap());
        let (subject, ca) = (format!("/CN={name}"), authority.file("ca.pem"));
        authority.request("ca", &["-x509", "-days", "2", "-subj", &subject, "-out", &ca]);
        authority
    }

    /// Its own certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.0.path().join("ca.pem")
    }

    /// A certificate of `name` for these places (`IP:10.0.0.1,DNS:a.example`), and its key.
    pub(crate) fn issue(&self, name: &str, places: &str) -> [PathBuf; 2] {
        let (subject, places) = (format!("/CN={name}"), format!("subjectAltName={places}"));
        let [asked, given] = ["csr", "pem"].map(|end| self.file(&format!("{name}.{end}")));
        self.request(name, &["-subj", &subject, "-addext", &places, "-out", &asked]);
        let (ca, key) = (self.file("ca.pem"), self.file("ca.key"));
        let words = ["openssl", "x509", "-req", "-days", "2", "-copy_extensions", "copy"];
        let files = ["-in", &asked, "-out", &given, "-CA", &ca, "-CAkey", &key, "-CAcreateserial"];
        run(&[&words[..], &files].concat());
        ["pem", "key"].map(|end| self.0.path().join(format!("{name}.{end}")))
    }

    fn request(&self, name: &str, words: &[&str]) {
        let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let key = self.file(&format!("{name}.key"));
        run(&[&["openssl", "req"][..], &curve, &["-keyout", &key], words].concat());
    }

    fn file(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}
