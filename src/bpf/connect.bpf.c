// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The connect hook: TCP connects of a cgroup go to weir on loopback, and weir can ask where each
 * one meant to go.
 *
 * connect4/6 rewrite the destination and remember the original in storage of the socket. sockops
 * publishes it under the source port, which the kernel has chosen by then, before the SYN leaves:
 * weir cannot accept earlier. getpeername4/6 show the application what it dialled. Never touches
 * UDP, loopback destinations, other network namespaces, or weir's own sockets.
 *
 * A connection whose record could not be written reaches weir without one and is reset there: a
 * destination is never guessed. While weir is silent, connects pass or are refused, as it asked for.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "shared.h"

#define CONNECT_REFUSED 0
#define CONNECT_PROCEED 1
#define TYPE_STREAM 1 /* SOCK_STREAM */
#define PROTOCOL_TCP 6
#define PROTOCOL_MPTCP 262
#define V4_MAPPED bpf_htonl(0xffff)
#define ECONNREFUSED 111
#define EEXIST 17
#define ENOBUFS 105

/* States of a TCP socket, include/net/tcp_states.h. */
#define STATE_ESTABLISHED 1
#define STATE_SYN_SENT 2
#define STATE_FIN_WAIT1 4
#define STATE_CLOSE 7
#define STATE_CLOSE_WAIT 8

/* Written by weir before the programs are loaded. */
const volatile __u64 weir_cgroup = 0;   /* its tasks are left alone; 0 for none */
const volatile __u64 weir_netns = 0;    /* cookie of the namespace in which weir listens */
const volatile __u32 weir_mark = 0;     /* sockets with this mark ... */
const volatile __u32 weir_mark_mask = 0; /* ... under this mask are weir's own; 0: none is */
const volatile __u32 weir_mptcp = 0;    /* the kernel has MPTCP: 0 leaves its helper uncalled */
const volatile __u32 weir_port = 0;     /* host order; weir listens on it on 127.0.0.1 and ::1 */

/* Where the socket meant to go. Lives and dies with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct record);
} dialled SEC(".maps");

/* Plain hash, no LRU: a full table refuses, an evicted record would misdirect. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024); /* set when loaded */
	__type(key, struct record_key);
	__type(value, struct record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct network);
	__type(value, __u32);
} include_nets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct network);
	__type(value, __u32);
} exclude_nets SEC(".maps");

/* One bit for each destination port, taken or not: 1024 words for each set of filters. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2048);
	__type(key, __u32);
	__type(value, __u64);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LOSS_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} losses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

static __always_inline void count(__u32 loss)
{
	__u64 *counter = bpf_map_lookup_elem(&losses, &loss);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

static __always_inline int is_v4(const struct address *ip)
{
	return !ip->word[0] && !ip->word[1] && ip->word[2] == V4_MAPPED;
}

/* Loopback and "this host", which connect(2) takes for loopback. */
static __always_inline int is_loopback(const struct address *ip)
{
	if (is_v4(ip)) {
		__u32 host = bpf_ntohl(ip->word[3]);

		return host >> 24 == 127 || !host;
	}
	return !ip->word[0] && !ip->word[1] && !ip->word[2] && bpf_ntohl(ip->word[3]) <= 1;
}

static __always_inline int is_wanted(__u32 set, const struct address *ip, __u32 port)
{
	struct network whole = { .prefix_bits = 64 + 128, .set = set, .family = 6, .ip = *ip };
	__u32 index = ((set & 1) << 10) + ((port >> 6) & 1023);
	__u64 *word = bpf_map_lookup_elem(&ports, &index);

	if (is_v4(ip)) {
		whole.prefix_bits = 64 + 32;
		whole.family = 4;
		whole.ip.word[0] = ip->word[3];
	}
	return word && (*word >> (port & 63) & 1) && bpf_map_lookup_elem(&include_nets, &whole) &&
	       !bpf_map_lookup_elem(&exclude_nets, &whole);
}

/* A connect of weir's own, or one that loopback cannot carry to weir. */
static __always_inline int is_out_of_reach(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (ctx->type != TYPE_STREAM)
		return 1;
	if (ctx->protocol != PROTOCOL_TCP && ctx->protocol != PROTOCOL_MPTCP)
		return 1;
	if (bpf_get_netns_cookie(ctx) != weir_netns)
		return 1;
	if (!sk || sk->bound_dev_if)
		return 1;
	if (weir_mark_mask && (sk->mark & weir_mark_mask) == weir_mark)
		return 1;
	return weir_cgroup && bpf_get_current_cgroup_id() == weir_cgroup;
}

/* The socket that the application holds, if `sk` is one of the subflows below an MPTCP socket: the
 * application asks that one for its peer, but a subflow dials. */
static __always_inline struct mptcp_sock *above(struct bpf_sock *sk)
{
	return weir_mptcp ? bpf_skc_to_mptcp_sock(sk) : 0;
}

/* An earlier connect of this socket may have failed. */
static __always_inline void forget(struct bpf_sock *sk)
{
	struct mptcp_sock *whole = above(sk);

	bpf_sk_storage_delete(&dialled, sk);
	if (whole)
		bpf_sk_storage_delete(&dialled, whole);
}

static __always_inline int remember(struct bpf_sock *sk, const struct address *ip, __u32 port)
{
	struct record *dst = bpf_sk_storage_get(&dialled, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	struct mptcp_sock *whole = above(sk);

	if (!dst)
		return 0;
	dst->ip = *ip;
	dst->port = port;
	if (!whole)
		return 1;
	dst = bpf_sk_storage_get(&dialled, whole, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!dst)
		return 0;
	dst->ip = *ip;
	dst->port = port;
	return 1;
}

enum verdict { LEAVE, REDIRECT, REFUSE };

/* What happens to a connect that is wanted. */
static __always_inline enum verdict serve(struct control *now)
{
	__s64 silence = bpf_ktime_get_ns() - now->beat_ns;

	if (now->mode != MODE_REFUSE && silence < SILENCE_NS)
		return REDIRECT;
	count(now->mode == MODE_OPEN ? LOSS_PASSED : LOSS_REFUSED);
	return now->mode == MODE_OPEN ? LEAVE : REFUSE;
}

static __always_inline enum verdict decide(struct bpf_sock_addr *ctx, const struct address *ip)
{
	__u32 port = bpf_ntohs((__u16)ctx->user_port);
	enum verdict verdict = LEAVE;
	struct control *now;
	__u32 first = 0;

	if (is_out_of_reach(ctx))
		return LEAVE;
	now = bpf_map_lookup_elem(&control, &first);
	if (now && !is_loopback(ip) && is_wanted(now->set, ip, port))
		verdict = serve(now);
	if (verdict != REDIRECT) {
		forget(ctx->sk);
		if (verdict == REFUSE)
			bpf_set_retval(-ECONNREFUSED);
		return verdict;
	}
	if (!remember(ctx->sk, ip, port)) {
		count(LOSS_STORAGE);
		bpf_set_retval(-ENOBUFS);
		return REFUSE;
	}
	return REDIRECT;
}

SEC("cgroup/connect4")
int weir_connect4(struct bpf_sock_addr *ctx)
{
	struct address ip = { .word = { 0, 0, V4_MAPPED, ctx->user_ip4 } };
	enum verdict verdict = decide(ctx, &ip);

	if (verdict == REDIRECT) {
		ctx->user_ip4 = bpf_htonl(0x7f000001);
		ctx->user_port = bpf_htons((__u16)weir_port);
	}
	return verdict == REFUSE ? CONNECT_REFUSED : CONNECT_PROCEED;
}

SEC("cgroup/connect6")
int weir_connect6(struct bpf_sock_addr *ctx)
{
	struct address ip = { .word = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
					ctx->user_ip6[3] } };
	enum verdict verdict = decide(ctx, &ip);

	if (verdict == REDIRECT) {
		int mapped = is_v4(&ip);

		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = mapped ? V4_MAPPED : 0;
		ctx->user_ip6[3] = mapped ? bpf_htonl(0x7f000001) : bpf_htonl(1);
		ctx->user_port = bpf_htons((__u16)weir_port);
	}
	return verdict == REFUSE ? CONNECT_REFUSED : CONNECT_PROCEED;
}

/* What the application dialled, if the name is the one that connect4/6 wrote over it. */
static __always_inline struct record *shown(struct bpf_sock_addr *ctx, const struct address *ip)
{
	if (!ctx->sk || !is_loopback(ip) || bpf_ntohs((__u16)ctx->user_port) != weir_port)
		return 0;
	return bpf_sk_storage_get(&dialled, ctx->sk, 0, 0);
}

SEC("cgroup/getpeername4")
int weir_peer4(struct bpf_sock_addr *ctx)
{
	struct address ip = { .word = { 0, 0, V4_MAPPED, ctx->user_ip4 } };
	struct record *dst = shown(ctx, &ip);

	if (dst && is_v4(&dst->ip)) {
		ctx->user_ip4 = dst->ip.word[3];
		ctx->user_port = bpf_htons((__u16)dst->port);
	}
	return 1;
}

SEC("cgroup/getpeername6")
int weir_peer6(struct bpf_sock_addr *ctx)
{
	struct address ip = { .word = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
					ctx->user_ip6[3] } };
	struct record *dst = shown(ctx, &ip);

	if (dst) {
		ctx->user_ip6[0] = dst->ip.word[0];
		ctx->user_ip6[1] = dst->ip.word[1];
		ctx->user_ip6[2] = dst->ip.word[2];
		ctx->user_ip6[3] = dst->ip.word[3];
		ctx->user_port = bpf_htons((__u16)dst->port);
	}
	return 1;
}

/* Loads one field of the context here and now: merged with another load, the compiler computes an
 * address inside the context, which the verifier refuses. */
#define LOAD(field)                                \
	({                                         \
		__u32 value_ = (field);            \
		asm volatile("" : "+r"(value_));   \
		value_;                            \
	})

/* weir's view of the socket's own end. */
static __always_inline struct record_key key_of(struct bpf_sock_ops *ctx, int as_v4)
{
	__u32 v4 = LOAD(ctx->local_ip4);
	__u32 a = LOAD(ctx->local_ip6[0]);
	__u32 b = LOAD(ctx->local_ip6[1]);
	__u32 c = LOAD(ctx->local_ip6[2]);
	__u32 d = LOAD(ctx->local_ip6[3]);
	struct record_key key = { .port = LOAD(ctx->local_port) };

	key.ip.word[0] = as_v4 ? 0 : a;
	key.ip.word[1] = as_v4 ? 0 : b;
	key.ip.word[2] = as_v4 ? V4_MAPPED : c;
	key.ip.word[3] = as_v4 ? v4 : d;
	return key;
}

/* The connect goes where connect4/6 sent it: no program after them has led it elsewhere. */
static __always_inline int is_ours(struct bpf_sock_ops *ctx, int as_v4)
{
	__u32 v4 = LOAD(ctx->remote_ip4);
	__u32 a = LOAD(ctx->remote_ip6[0]);
	__u32 b = LOAD(ctx->remote_ip6[1]);
	__u32 c = LOAD(ctx->remote_ip6[2]);
	__u32 d = LOAD(ctx->remote_ip6[3]);
	__u32 port = LOAD(ctx->remote_port);

	if (bpf_ntohl(port) != weir_port)
		return 0;
	return as_v4 ? v4 == bpf_htonl(0x7f000001) : !a && !b && !c && d == bpf_htonl(1);
}

static __always_inline void publish(struct bpf_sock_ops *ctx, struct record *dst)
{
	struct record_key key = key_of(ctx, is_v4(&dst->ip));
	struct record value = *dst;
	long error;

	if (!is_ours(ctx, is_v4(&dst->ip))) {
		count(LOSS_OVERRULED);
		return;
	}
	value.cookie = bpf_get_socket_cookie(ctx);
	dst->cookie = value.cookie;
	error = bpf_map_update_elem(&records, &key, &value, BPF_NOEXIST);
	if (!error) {
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_STATE_CB_FLAG);
	} else if (error == -EEXIST) {
		/* The connection before this one may still wait in weir's accept queue. Whose record
		 * weir would find depends on timing: leave none. */
		bpf_map_delete_elem(&records, &key);
		count(LOSS_RECORD_CLASH);
	} else {
		count(LOSS_RECORDS_FULL);
	}
}

/*
 * A connection that died can be accepted by nobody: its record goes. States that lead through
 * TIME_WAIT are left out: there weir has accepted or will, and the port may be in new hands.
 */
static __always_inline void withdraw(struct bpf_sock_ops *ctx, struct record *dst)
{
	__u32 from = ctx->args[0];
	struct record_key key;
	struct record *found;

	if (ctx->args[1] != STATE_CLOSE)
		return;
	if (from != STATE_SYN_SENT && from != STATE_ESTABLISHED && from != STATE_FIN_WAIT1 &&
	    from != STATE_CLOSE_WAIT)
		return;
	key = key_of(ctx, is_v4(&dst->ip));
	found = bpf_map_lookup_elem(&records, &key);
	if (found && found->cookie == dst->cookie)
		bpf_map_delete_elem(&records, &key);
}

SEC("sockops")
int weir_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct record *dst;

	if (!sk || (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ctx->op != BPF_SOCK_OPS_STATE_CB))
		return 1;
	dst = bpf_sk_storage_get(&dialled, sk, 0, 0);
	if (!dst)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		publish(ctx, dst);
	else
		withdraw(ctx, dst);
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
