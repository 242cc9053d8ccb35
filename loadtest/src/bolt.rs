// SPDX-License-Identifier: Apache-2.0
//! As much of SOFABolt as a load test needs: requests of one size, and answers made of them in place.

/// A message of requests for the service `bench`, `frame` bytes each, with ids of their own.
pub(crate) fn requests(message: usize, frame: usize) -> Vec<u8> {
    let mut bytes = vec![b'Z'; message];
    for (id, request) in (1u32..).zip(bytes.chunks_mut(frame)) {
        let content = u32::try_from(request.len() - HEAD.len() - SERVICE.len()).unwrap_or(0);
        let mut head = HEAD;
        head[5..9].copy_from_slice(&id.to_be_bytes());
        head[17] = SERVICE.len().to_le_bytes()[0];
        head[18..].copy_from_slice(&content.to_be_bytes());
        request[..head.len()].copy_from_slice(&head);
        request[head.len()..][..SERVICE.len()].copy_from_slice(SERVICE);
    }
    bytes
}

/// Makes answers of what came behind `from` bytes of a connection: of the same size, with the same id.
pub(crate) fn answer(bytes: &mut [u8], from: u64, frame: usize) {
    let content = u32::try_from(frame - ANSWER_BYTES).unwrap_or(0).to_be_bytes();
    let mut at = usize::try_from(from % frame as u64).unwrap_or(0);
    let mut rest = bytes;
    while !rest.is_empty() {
        let part = rest.len().min(frame - at);
        let (here, behind) = rest.split_at_mut(part);
        for (place, byte) in (at..ANSWER_BYTES).zip(here) {
            *byte = match place {
                1 | 2 => 0,
                3 => 2,
                10..16 => 0,
                16.. => content[place - 16],
                _ => *byte,
            };
        }
        (rest, at) = (behind, 0);
    }
}

/// Frames must hold the head and the name.
pub(crate) const FRAME_BYTES_MIN: usize = HEAD.len() + SERVICE.len();
const ANSWER_BYTES: usize = 20;
/// Version 1, a request that waits for 10 s.
const HEAD: [u8; 22] = [1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0x27, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
const SERVICE: &[u8] = b"\0\0\0\x07service\0\0\0\x05bench";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_the_same_however_the_requests_are_cut() {
        let requests = requests(3 * 64, 64);
        assert_eq!(requests[64..][..10], [1, 1, 0, 1, 1, 0, 0, 0, 2, 1]);
        assert_eq!(requests[64 + 16..][..6], [0, 20, 0, 0, 0, 22], "22 + 20 + 22 are 64");
        let mut whole = requests.clone();
        answer(&mut whole, 640, 64);
        assert_eq!(
            whole[64..][..20],
            [1, 0, 0, 2, 1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 44]
        );
        for cut in 0..requests.len() {
            let mut parts = requests.clone();
            let (one, other) = parts.split_at_mut(cut);
            answer(one, 0, 64);
            answer(other, cut as u64, 64);
            assert!(parts == whole, "cut at {cut}");
        }
    }
}
