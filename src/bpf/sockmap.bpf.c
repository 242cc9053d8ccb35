// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The sockmap relay: bytes that arrive on one socket of a flow leave by the other, and user space
 * sleeps.
 *
 * A verdict program (no parser) runs for every segment that a socket in `sources` received, under
 * that socket's lock. It redirects the segment to the flow's other socket, or passes it to user
 * space. Once it has passed a byte of a direction it passes all that follow: order is kept without
 * any hand-shake, and nothing ever leaves a map in mid-stream, which would lose bytes.
 *
 * Four things that the kernel leaves to this program:
 *
 * - Redirecting knows no back-pressure. A segment is redirected only if the other socket can take
 *   it at once and its peer is not too far behind, so that nothing waits outside a send buffer.
 * - A retransmitted segment may overlap bytes that came before. recv(2) skips them, the way to
 *   this program does not: they are trimmed by sequence number.
 * - A segment that is passed while this very socket still has redirected ones to send waits behind
 *   them in a queue that is charged to nobody, and the peer's window stays open. So once a direction
 *   is passed for being behind, nothing is redirected into its source any more.
 * - The FIN arrives as a segment without bytes. Redirected, or passed while something is on its way
 *   to this very socket, it goes through a queue that takes an empty segment for a broken socket.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "sockmap.h"

/* The parts of the kernel's own structures that are read here; the loader finds their offsets. */
#define KERNEL __attribute__((preserve_access_index))

struct sock {
	int sk_sndbuf;
	int sk_wmem_queued;
} KERNEL;

struct inet_sock {
	struct sock sk;
} KERNEL;

struct inet_connection_sock {
	struct inet_sock icsk_inet;
} KERNEL;

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 copied_seq;
	__u32 snd_una;
	__u32 write_seq;
} KERNEL;

struct sk_buff {
	char cb[48];
} KERNEL;

struct tcp_skb_cb {
	__u32 seq;
} KERNEL;

#define STATE_CLOSE 7 /* include/net/tcp_states.h */

/* Written by weir before the programs are loaded. */
const volatile __u32 weir_credit_bytes = 0; /* what a peer may be behind */

/* Sockets that are read by the kernel. The verdict program is attached here. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2); /* set when loaded */
	__type(key, __u32);
	__type(value, __u32);
} sources SEC(".maps");

/* Sockets that are written to by the kernel. A flow's two go in here before the first goes into
 * `sources`, so that no segment ever finds its target missing. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2); /* set when loaded */
	__type(key, __u32);
	__type(value, __u32);
} targets SEC(".maps");

/* Socket cookie to place. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2); /* set when loaded */
	__type(key, __u64);
	__type(value, __u32);
} places SEC(".maps");

/* By the place of the socket that is read. weir reads it as memory. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2); /* set when loaded */
	__type(key, __u32);
	__type(value, struct direction);
} directions SEC(".maps");

/* Places of directions that have just been left to user space or broken: weir sleeps on it. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

/* Whoever finds no room has weir awake already, and it looks at every direction now and then. */
static __always_inline void report(__u32 place)
{
	bpf_ringbuf_output(&events, &place, sizeof(place), BPF_RB_FORCE_WAKEUP);
}

/* The sequence number of a segment's first byte: what TCP keeps in `cb` (`struct tcp_skb_cb`). The
 * context of this program type is the kernel's own `struct sk_buff`. */
static __always_inline long sequence_of(struct __sk_buff *skb, __u32 *sequence)
{
	const char *cb = (void *)skb + bpf_core_field_offset(struct sk_buff, cb);

	return bpf_probe_read_kernel(sequence, sizeof(*sequence),
				     cb + bpf_core_field_offset(struct tcp_skb_cb, seq));
}

/* Cuts `bytes` from the front of a segment. One call of the helper cuts 4,095 at most. */
static __always_inline long trim(struct __sk_buff *skb, __u32 bytes)
{
	for (int i = 0; i < TRIM_STEPS_MAX && bytes; i++) {
		__u32 step = bytes < 4095 ? bytes : 4095;

		if (bpf_skb_adjust_room(skb, -(__s32)step, 0, 0))
			return -1;
		bytes -= step;
	}
	return bytes ? -1 : 0;
}

/* Cuts what came before from the front of the segment; says no if the stream has a hole or the
 * segment cannot be cut. */
static __always_inline int is_continuous(struct __sk_buff *skb, struct direction *direction)
{
	__u32 sequence, len = skb->len;
	__s32 doubled;

	if (!direction->is_begun) {
		struct bpf_sock *sk = skb->sk;
		struct tcp_sock *tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;

		if (!tcp)
			return 0;
		/* Where user space stopped reading: it may have read the front of this segment. */
		direction->next_sequence = tcp->copied_seq;
		direction->is_begun = 1;
	}
	if (sequence_of(skb, &sequence))
		return 0;
	doubled = direction->next_sequence - sequence;
	if (doubled < 0)
		return 0;
	if (doubled > 0) {
		__u32 cut = (__u32)doubled < len ? (__u32)doubled : len;

		direction->trimmed += cut;
		if (trim(skb, cut))
			return 0;
	}
	direction->next_sequence += skb->len;
	return 1;
}

/* Whether the target can take `len` bytes now. What was redirected before and did not yet get to
 * the socket counts with them. Nobody but the kernel writes to the target any more. */
static __always_inline __u32 reason_to_pass(struct direction *direction, __u32 target, __u32 len)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&targets, &target);
	__u32 reason = PASS_TARGET_GONE;
	struct tcp_sock *tcp;

	if (!sk)
		return PASS_TARGET_GONE;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (tcp) {
		__u32 written = tcp->write_seq, end;
		struct sock *target_sk = &tcp->inet_conn.icsk_inet.sk;
		__u32 half = (__u32)target_sk->sk_sndbuf / 2;
		__u32 queued = (__u32)target_sk->sk_wmem_queued;

		if (!direction->forwarded)
			direction->first_write = written;
		end = direction->first_write + (__u32)direction->forwarded + len;
		if (end - tcp->snd_una > weir_credit_bytes)
			reason = PASS_CREDIT;
		else if (queued + (end - written) + SEGMENT_OVERHEAD > half)
			reason = PASS_ROOM;
		else
			reason = PASS_NOTHING;
	}
	bpf_sk_release(sk);
	return reason;
}

/* The other direction was left to user space, and not because weir asked for it. */
static __always_inline int partner_is_behind(__u32 place)
{
	__u32 partner = place ^ 1;
	struct direction *other = bpf_map_lookup_elem(&directions, &partner);

	return other && other->passes > PASS_ASKED;
}

SEC("sk_skb/stream_verdict")
int weir_forward(struct __sk_buff *skb)
{
	struct direction *direction;
	__u64 cookie;
	__u32 *found, place, len;

	if (!skb->len)
		return SK_DROP; /* the socket has taken note of the FIN already */
	cookie = bpf_get_socket_cookie(skb);
	found = bpf_map_lookup_elem(&places, &cookie);
	if (!found)
		return SK_PASS;
	place = *found;
	direction = bpf_map_lookup_elem(&directions, &place);
	if (!direction)
		return SK_PASS;
	if (direction->is_broken)
		return SK_DROP;
	if (!is_continuous(skb, direction)) {
		direction->is_broken = 1; /* weir resets the flow */
		report(place);
		return SK_DROP;
	}
	len = skb->len;
	if (!len)
		return SK_DROP;
	if (!direction->passes) {
		__u32 reason = partner_is_behind(place) ?
				       PASS_PARTNER :
				       reason_to_pass(direction, place ^ 1, len);

		if (reason == PASS_NOTHING) {
			if (bpf_sk_redirect_map(skb, &targets, place ^ 1, 0) == SK_PASS) {
				direction->forwarded += len;
				return SK_PASS;
			}
			reason = PASS_TARGET_GONE;
		}
		direction->passes = reason;
		report(place);
	}
	direction->passed += len;
	return SK_PASS;
}

/* Run by weir: how many bytes of the direction, named by the packet's first word, are on their way
 * to the target's send buffer. */
SEC("classifier")
int weir_backlog(struct __sk_buff *skb)
{
	__u32 *word = (void *)(long)skb->data, place, target, backlog = BACKLOG_UNKNOWN;
	struct direction *direction;
	struct tcp_sock *tcp;
	struct bpf_sock *sk;

	if ((void *)(word + 1) > (void *)(long)skb->data_end)
		return BACKLOG_UNKNOWN;
	place = *word;
	target = place ^ 1;
	direction = bpf_map_lookup_elem(&directions, &place);
	if (!direction)
		return BACKLOG_UNKNOWN;
	if (!direction->forwarded)
		return 0;
	sk = bpf_map_lookup_elem(&targets, &target);
	if (!sk)
		return BACKLOG_UNKNOWN;
	/* A connection that is over takes nothing any more. */
	tcp = sk->state == STATE_CLOSE ? 0 : bpf_skc_to_tcp_sock(sk);
	if (tcp)
		backlog = direction->first_write + (__u32)direction->forwarded - tcp->write_seq;
	bpf_sk_release(sk);
	return backlog;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
