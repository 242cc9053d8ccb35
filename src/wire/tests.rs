// SPDX-License-Identifier: Apache-2.0
//! Every parser against frames that others wrote, at every split point, and against noise.

use std::fmt::Debug;

use super::*;

/// Frames written by other people's encoders; `tests/vectors/make` makes them.
const FRAMES: &str = include_str!("../../tests/vectors/frames.jsonl");

/// What fuzzing starts from, and what it has found.
const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");

const BAD: &str = "bad";
const NOT_MINE: &str = "not mine";

/// The answer as text, without the reason of a refusal: which of two faults is found first may
/// depend on what has come.
fn said<T: Debug>(result: Result<T, Stop>) -> Result<String, usize> {
    match result {
        Ok(found) => Ok(format!("{found:?}")),
        Err(Stop::Bad(_)) => Ok(BAD.to_owned()),
        Err(Stop::NotMine) => Ok(NOT_MINE.to_owned()),
        Err(Stop::NeedMore(bytes)) => Err(bytes),
    }
}

fn answers(bytes: &[u8]) -> [Result<String, usize>; 7] {
    [
        said(bolt::parse(bytes)),
        said(detect::detect(bytes)),
        said(dubbo::parse(bytes)),
        said(http1::parse(bytes)),
        said(http1::parse_answer(bytes, false)),
        said(http2::parse(bytes)),
        said(tls::parse(bytes)),
    ]
}

/// However the bytes come, the answer is the same, and what is asked for is more than there is, and
/// never more than it takes to find something.
fn settles(bytes: &[u8]) {
    let last = answers(bytes);
    let mut before = answers(&[]);
    for len in 0..=bytes.len() {
        let now = answers(&bytes[..len]);
        for (index, (now, last)) in now.iter().zip(&last).enumerate() {
            let is_found = last.as_ref().is_ok_and(|text| text != BAD && text != NOT_MINE);
            match now {
                Err(needed) => {
                    assert!(*needed > len, "{index}: asks for what is there, at {len}");
                    assert!(!is_found || *needed <= bytes.len(), "{index}: too much, at {len}");
                }
                now => assert_eq!(now, last, "{index} at {len} of {bytes:02x?}"),
            }
            if let (Err(needed), Ok(_), true) = (&before[index], now, is_found) {
                assert!(*needed <= len, "{index}: {needed} were asked for, {len} were enough");
            }
        }
        before = now;
    }
}

fn vectors(protocol: &str) -> Vec<(serde_json::Value, Vec<u8>)> {
    let all = FRAMES.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let found: Vec<_> = all
        .filter(|vector| vector["protocol"] == protocol)
        .map(|vector| {
            let bytes = unhex(vector["hex"].as_str().unwrap());
            (vector, bytes)
        })
        .collect();
    assert!(found.len() > 3, "vectors of {protocol}");
    found
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|digit| digit.to_digit(16))
        .map(|digit| digit.try_into().unwrap())
        .collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The vector's bytes with another frame behind them: nothing of that may matter.
fn followed(bytes: &[u8]) -> Vec<u8> {
    [bytes, bytes, b"\xff"].concat()
}

#[test]
fn bolt_frames_of_others_are_read() {
    for (vector, bytes) in vectors("bolt") {
        settles(&bytes);
        let more = followed(&bytes);
        let frame = bolt::parse(&more).unwrap();
        assert_eq!(frame.frame_len, bytes.len() as u64, "{vector}");
        assert_eq!(format!("{:?}", frame.kind), vector["kind"].as_str().unwrap(), "{vector}");
        assert_eq!(u64::from(frame.request_id), vector["id"].as_u64().unwrap(), "{vector}");
        assert_eq!(u64::from(frame.version), vector["version"].as_u64().unwrap(), "{vector}");
        let service = frame.service.map(|service| std::str::from_utf8(service).unwrap());
        assert_eq!(service, vector["service"].as_str(), "{vector}");
        assert_eq!(frame.has_crc, vector["crc"].as_bool().unwrap(), "{vector}");
        assert!(bolt::is_intact(&frame, &more), "{vector}");
        let mut broken = bytes.clone();
        *broken.last_mut().unwrap() ^= 1;
        let broken_frame = bolt::parse(&broken).unwrap();
        assert_eq!(bolt::is_intact(&broken_frame, &broken), !frame.has_crc, "{vector}");
        assert_eq!(bolt::is_intact(&frame, &bytes[..bytes.len() - 1]), !frame.has_crc, "{vector}");
        assert_eq!(detect::detect(&bytes), Ok(detect::Protocol::Bolt), "{vector}");
    }
}

#[test]
fn bolt_checksum_is_the_one_of_zlib() {
    let heartbeat = unhex("0202010000010000000801 01 00000bb8 0000 0000 00000000 d3ea5c58");
    let frame = bolt::parse(&heartbeat).unwrap();
    assert!(frame.has_crc && bolt::is_intact(&frame, &heartbeat));
    let mut crc = bolt::Crc::new();
    crc.add(b"1234");
    crc.add(b"56789");
    assert_eq!(crc.value(), 0xcbf4_3926);
}

/// A v1 request with this header map.
fn bolt_request(pairs: &[(&[u8], Option<&[u8]>)]) -> Vec<u8> {
    let mut header = Vec::new();
    let mut put = |text: Option<&[u8]>| match text {
        Some(text) => {
            header.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            header.extend(text);
        }
        None => header.extend([0xff; 4]),
    };
    for (key, value) in pairs {
        put(Some(key));
        put(*value);
    }
    let mut bytes = unhex("01 01 0001 01 00000001 01 00000bb8 0000");
    bytes.extend(u16::try_from(header.len()).unwrap().to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(header);
    bytes
}

#[test]
fn bolt_headers_that_disagree_or_are_cut_are_refused() {
    let target: &[u8] = b"sofa_head_target_service";
    for (pairs, expected) in [
        (vec![(target, Some(&b"a:1"[..])), (b"service", Some(b"a:1"))], Ok(Some(&b"a:1"[..]))),
        (vec![(target, Some(b"a:1"))], Ok(Some(b"a:1"))),
        (vec![(b"x", None), (b"service", Some(b"a:1")), (b"service", None)], Ok(Some(b"a:1"))),
        (vec![(b"service", Some(b""))], Ok(None)),
        (vec![], Ok(None)),
        (vec![(b"service", Some(b"a:1")), (target, Some(b"b:1"))], Err(())),
        (vec![(b"service", Some(b"a:1")), (b"service", Some(b"b:1"))], Err(())),
    ] {
        let bytes = bolt_request(&pairs);
        settles(&bytes);
        let found = bolt::parse(&bytes).map(|frame| frame.service).map_err(|_| ());
        assert_eq!(found, expected, "{pairs:?}");
    }
    let mut cut = bolt_request(&[(b"service", Some(b"a:1"))]);
    cut[25] = 200; // The key seems longer than the map.
    assert!(matches!(bolt::parse(&cut), Err(Stop::Bad(_))));
    let mut negative = bolt_request(&[]);
    negative[16] = 0x80;
    assert!(matches!(bolt::parse(&negative), Err(Stop::Bad(_))), "Java reads it as negative");
}

#[test]
fn dubbo_frames_of_others_are_read() {
    for (vector, bytes) in vectors("dubbo") {
        settles(&bytes);
        let more = followed(&bytes);
        let frame = dubbo::parse(&more).unwrap();
        assert_eq!(frame.frame_len, bytes.len() as u64, "{vector}");
        assert_eq!(format!("{:?}", frame.kind), vector["kind"].as_str().unwrap(), "{vector}");
        assert_eq!(frame.request_id, vector["id"].as_u64().unwrap(), "{vector}");
        let text = |bytes| std::str::from_utf8(bytes).unwrap();
        assert_eq!(frame.service.map(|one| text(one.path)), vector["service"].as_str());
        assert_eq!(frame.service.map(|one| text(one.version)), vector["of"].as_str());
        assert_eq!(detect::detect(&bytes), Ok(detect::Protocol::Dubbo), "{vector}");
    }
}

#[test]
fn dubbo_strings_count_units_of_utf16() {
    // One four-byte sequence counts two units; what Java writes, two of three bytes, counts two.
    for path in ["f09f9880", "eda0bdedb880"] {
        let body = format!("00 02{path} 4e");
        let len = unhex(&body).len();
        let bytes = unhex(&format!("dabb c2 00 0000000000000001 {len:08x} {body}"));
        settles(&bytes);
        let service = dubbo::parse(&bytes).unwrap().service.unwrap();
        assert_eq!((service.path, service.version), (&unhex(path)[..], &b""[..]));
    }
    for bad in ["00 4e 4e", "00 01ff 00", "00 05616263", "00 5200046162", "91 0161 00"] {
        let len = unhex(bad).len();
        let bytes = unhex(&format!("dabb c2 00 0000000000000001 {len:08x} {bad} 00 00 00 00"));
        assert!(matches!(dubbo::parse(&bytes), Err(Stop::Bad(_))), "{bad}");
        settles(&bytes);
    }
}

#[test]
fn http1_heads_are_read() {
    let text = b"POST /com.a.Demo/plus?x HTTP/1.1\r\nhost: Demo.Example:8080\r\nTarget-Service: com.a.Demo:1.0 \r\n\
                 content-length: 12\r\nExpect: 100-continue\r\n\r\nhello world!";
    settles(text);
    let head = http1::parse(text).unwrap();
    let expected = http1::Head {
        body: http1::Body::Length(12),
        closes: false,
        expects_continue: true,
        head_len: text.len() - 12,
        host: b"Demo.Example",
        is_upgrade: false,
        method: b"POST",
        target: b"/com.a.Demo/plus?x",
        target_service: b"com.a.Demo:1.0",
    };
    assert_eq!(head, expected);
    assert_eq!(detect::detect(text), Ok(detect::Protocol::Http1));
    let chunked =
        b"PUT http://[::1]:80/x HTTP/1.1\r\nHost: other\r\nTransfer-Encoding: chunked\r\n\r\n";
    let head = http1::parse(chunked).unwrap();
    assert_eq!((head.host, head.body), (&b"[::1]"[..], http1::Body::Chunked));
    let upgrade = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n";
    assert!(http1::parse(upgrade).unwrap().is_upgrade);
    for (head, closes) in [
        ("HTTP/1.1\r\nConnection: close", true),
        ("HTTP/1.1\r\nConnection: Upgrade,CLOSE", true),
        ("HTTP/1.1\r\nConnection: keep-alive", false),
        ("HTTP/1.0\r\nHost: a", true),
        ("HTTP/1.0\r\nConnection: Keep-Alive", false),
        ("HTTP/1.0\r\nConnection: keep-alive\r\nConnection: close", true),
    ] {
        let text = format!("GET / {head}\r\n\r\n");
        assert_eq!(http1::parse(text.as_bytes()).unwrap().closes, closes, "{head}");
    }
}

#[test]
fn http1_answers_are_read() {
    use http1::Body::{Chunked, End, Length};
    for (line, headers, expected) in [
        ("HTTP/1.1 200 OK", "Content-Length: 5\r\n", (Length(5), false, 200)),
        ("HTTP/1.1 200", "Content-Length: 0\r\nConnection: x, close\r\n", (Length(0), true, 200)),
        ("HTTP/1.1 200 ", "transfer-encoding: chunked\r\n", (Chunked, false, 200)),
        ("HTTP/1.1 500 Oh no", "", (End, true, 500)),
        ("HTTP/1.1 204 No", "", (Length(0), false, 204)),
        ("HTTP/1.1 304 Not", "Content-Length: 500\r\n", (Length(0), false, 304)),
        ("HTTP/1.1 103 Early", "Link: x\r\n", (Length(0), false, 103)),
        ("HTTP/1.0 200 OK", "Content-Length: 1\r\n", (Length(1), true, 200)),
        (
            "HTTP/1.0 200 OK",
            "Content-Length: 1\r\nConnection: Keep-Alive\r\n",
            (Length(1), false, 200),
        ),
    ] {
        let text = format!("{line}\r\n{headers}\r\n");
        settles(text.as_bytes());
        let more = followed(text.as_bytes());
        let answer = http1::parse_answer(&more, false).unwrap();
        assert_eq!((answer.body, answer.closes, answer.status), expected, "{text:?}");
        assert_eq!(answer.head_len, text.len());
        let to_head = http1::parse_answer(&more, true).unwrap();
        assert_eq!(to_head.body, Length(0), "an answer to HEAD has no body: {text:?}");
    }
    for (line, headers) in [
        ("HTTP/2.0 200 OK", ""),
        ("HTTP/1.1 20 OK", ""),
        ("HTTP/1.1 2000 OK", ""),
        ("HTTP/1.1 099 OK", ""),
        ("HTTP/1.1  200 OK", ""),
        ("HTTP/1.1 200 OK", "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
        ("HTTP/1.1 200 OK", "Content-Length: 1\r\nContent-Length: 1\r\n"),
        ("HTTP/1.1 200 OK", "Transfer-Encoding: gzip\r\n"),
        ("HTTP/1.1 200 OK", "X : y\r\n"),
    ] {
        let text = format!("{line}\r\n{headers}\r\n");
        settles(text.as_bytes());
        let answer = http1::parse_answer(text.as_bytes(), false);
        assert!(matches!(answer, Err(Stop::Bad(_))), "{text:?}");
    }
}

#[test]
fn http1_chunks_end_at_the_same_place_however_they_are_cut() {
    let next = b"HTTP/1.1 200 OK\r\n";
    for body in [
        "0\r\n\r\n",
        "5\r\nhello\r\n0\r\n\r\n",
        "a;x=\"y\"\r\n0123456789\r\n1 \r\n!\r\n00\r\nA: b\r\nC: d\r\n\r\n",
    ] {
        let bytes = [body.as_bytes(), next].concat();
        for cut in 0..=bytes.len() {
            let mut chunks = http1::Chunks::new();
            let first = chunks.eat(&bytes[..cut]).unwrap();
            assert_eq!(first, cut.min(body.len()));
            let second = chunks.eat(&bytes[first..]).unwrap();
            assert_eq!((first + second, chunks.is_over()), (body.len(), true), "{body:?} at {cut}");
        }
        let mut slow = http1::Chunks::new();
        let eaten: usize = bytes.iter().map(|byte| slow.eat(&[*byte]).unwrap()).sum();
        assert_eq!(eaten, body.len());
    }
    for broken in [
        "\r\n",
        "g\r\n",
        "5\r\nhello!",
        "5\n",
        "-1\r\n",
        "0x5\r\n",
        "fffffffffffffffff\r\n",
        "0\r\n\n",
        "5\r\nhello\n",
    ] {
        assert!(http1::Chunks::new().eat(broken.as_bytes()).is_err(), "{broken:?}");
    }
    let endless = format!("0\r\n{}", "A: b\r\n".repeat(3000));
    assert!(http1::Chunks::new().eat(endless.as_bytes()).is_err(), "a trailer has its limit");
}

#[test]
fn http1_heads_that_could_smuggle_are_refused() {
    for headers in [
        "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 1\r\nContent-Length: 2\r\n",
        "Content-Length: +1\r\n",
        "Content-Length: 1, 1\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Host: b\r\n",
        "X: a\r\n folded\r\n",
        "Content-Length : 1\r\n",
        "X: a\rb\r\n",
        "X: a\nb\r\n",
        "no colon\r\n",
    ] {
        let text = format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
        assert!(matches!(http1::parse(text.as_bytes()), Err(Stop::Bad(_))), "{headers:?}");
        settles(text.as_bytes());
    }
    for line in ["GET /\r\n", "GET / HTTP/2.0\r\n", "GET  / HTTP/1.1\r\n", "GET / HTTP/1.1 \r\n"] {
        let text = format!("{line}Host: a\r\n\r\n");
        assert!(matches!(http1::parse(text.as_bytes()), Err(Stop::Bad(_))), "{line:?}");
    }
    let endless = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 40_000]].concat();
    assert!(matches!(http1::parse(&endless), Err(Stop::Bad(_))));
}

#[test]
fn http2_openings_of_others_are_read() {
    for (vector, bytes) in vectors("http2") {
        settles(&bytes);
        let more = followed(&bytes);
        let opening = http2::parse(&more).unwrap();
        let authority = std::str::from_utf8(opening.authority.as_bytes()).unwrap();
        assert_eq!(authority, vector["authority"].as_str().unwrap());
        let path = std::str::from_utf8(opening.path.as_bytes()).unwrap();
        assert_eq!(path, vector["path"].as_str().unwrap());
        assert!(opening.len <= bytes.len());
        assert_eq!(detect::detect(&bytes), Ok(detect::Protocol::Http2));
    }
    let (_, bytes) = vectors("http2").remove(0);
    let opening = http2::parse(&bytes).unwrap();
    assert_eq!(opening.host(), b"demo.example");
    assert_eq!(opening.grpc_service(), Some(&b"com.a.DemoService"[..]));
}

#[test]
fn http2_that_begins_otherwise_is_refused() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = "000000 04 00 00000000";
    for (frames, is_bad) in [
        ("000001 01 04 00000001 82".to_owned(), true), // Settings come first.
        (format!("{settings} 000001 00 00 00000001 00"), true), // No data without headers.
        (format!("{settings} 000001 01 04 00000002 82"), true), // Even streams are the server's.
        (format!("{settings} 004001 01 04 00000001"), true), // Larger than allowed.
        (format!("{settings} 000001 01 00 00000001 82 000001 09 04 00000003 82"), true),
        (format!("{settings} 000001 01 04 00000001 80"), true), // Index 0.
        (format!("{settings} 000001 01 04 00000001 be"), true), // Nothing in the table yet.
        (format!("{settings} 000002 01 0c 00000001 09 82"), true), // More padding than frame.
        (format!("{settings} 000004 01 04 00000001 01 83 ffff"), true), // Padding is no character.
        (format!("{settings} 000002 01 04 00000001 82 84"), false),
        (format!("{settings} 000002 01 04 00000001 84 84"), true), // Two paths.
    ] {
        let bytes = [&preface[..], &unhex(&frames)].concat();
        assert_eq!(matches!(http2::parse(&bytes), Err(Stop::Bad(_))), is_bad, "{frames}");
        settles(&bytes);
    }
}

#[test]
fn client_hellos_of_others_are_read() {
    for (vector, bytes) in vectors("tls") {
        settles(&bytes);
        let found = tls::parse(&followed(&bytes)).unwrap();
        let host = found.as_ref().map(|name| std::str::from_utf8(name.as_bytes()).unwrap());
        assert_eq!(host, vector["host"].as_str(), "{vector}");
        assert_eq!(detect::detect(&bytes), Ok(detect::Protocol::Tls));
    }
}

/// A client that sends its hello byte by byte is looked at when a whole record is there.
#[test]
fn hello_is_asked_for_record_by_record() {
    for (vector, bytes) in vectors("tls") {
        let (mut asked, mut len) = (0, 0);
        while let Err(Stop::NeedMore(needed)) = tls::parse(&bytes[..len]) {
            (asked, len) = (asked + 1, needed);
        }
        // Each record's head begins with its kind, and there are no more bytes 0x16 than that and chance.
        let records = bytes.windows(3).filter(|three| matches!(three, [0x16, 3, 0..=4])).count();
        assert!(asked <= 2 * records, "{vector}: {asked} looks at {records} records");
    }
}

#[test]
fn strangers_are_nobodys() {
    for bytes in [
        &b"\x00\x00\x00\x05"[..],
        b"SSH-2.0-OpenSSH\x0d\x0a",
        b"\x16\x02\x00",
        b"*1\r\n$4\r\nPING\r\n",
    ] {
        assert_eq!(detect::detect(bytes), Err(Stop::NotMine), "{bytes:?}");
    }
    assert_eq!(detect::detect(b"\x01"), Err(Stop::NeedMore(3)));
    assert_eq!(detect::detect(b"PRI"), Err(Stop::NeedMore(8)));
    assert_eq!(detect::detect(b""), Err(Stop::NeedMore(2)));
}

#[test]
fn corpus_of_the_fuzzer_is_answered() {
    let mut files = 0;
    for directory in std::fs::read_dir(CORPUS).unwrap() {
        for file in std::fs::read_dir(directory.unwrap().path()).unwrap() {
            settles(&std::fs::read(file.unwrap().path()).unwrap());
            files += 1;
        }
    }
    assert!(files >= 20, "{files} files in {CORPUS}");
}

proptest::proptest! {
    #[test]
    fn noise_is_answered_the_same_however_it_comes(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
    ) {
        settles(&bytes);
    }

    #[test]
    fn broken_frames_are_answered_the_same_however_they_come(
        which in 0usize..10_000,
        changes in proptest::collection::vec((0usize..600, proptest::prelude::any::<u8>()), 1..6),
        cut in 1usize..700,
    ) {
        let frames: Vec<_> = ["bolt", "dubbo", "http2", "tls"].into_iter().flat_map(vectors).collect();
        let mut bytes = frames[which % frames.len()].1.clone();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(cut);
        settles(&bytes);
    }
}
