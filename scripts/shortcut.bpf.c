// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * A shortcut over loopback, to be judged by scripts/shortcut and used by nothing else: sockops puts
 * both ends of connections to one port into sockmaps, and what an end sends goes straight to the
 * receive side of the other one.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum mode {
	MODE_OFF,      /* no socket is put anywhere */
	MODE_MEMBER,   /* the application's socket is in a map; everything it sends passes */
	MODE_SENDING,  /* what the application sends is redirected */
	MODE_BOTH,     /* and what is sent to it */
	MODE_ALTERNATE /* every other message that the application sends is redirected */
};

struct wish {
	__u32 mode;
	__u32 port; /* host order; of the end that accepts */
	__u64 redirected;
	__u64 messages;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct wish);
} wishes SEC(".maps");

#define SOCKHASH(name)                              \
	struct {                                    \
		__uint(type, BPF_MAP_TYPE_SOCKHASH); \
		__uint(max_entries, 65536);          \
		__type(key, __u32);                  \
		__type(value, __u32);                \
	} name SEC(".maps")

/* By the port of the end that dialled. */
SOCKHASH(dialled);          /* with the program */
SOCKHASH(accepted);         /* targets alone */
SOCKHASH(accepted_sending); /* with the program */

/* One field of the context, here and now: see connect.bpf.c. */
#define LOAD(field)                                \
	({                                         \
		__u32 value_ = (field);            \
		asm volatile("" : "+r"(value_));   \
		value_;                            \
	})

static __always_inline struct wish *wish(void)
{
	__u32 first = 0;

	return bpf_map_lookup_elem(&wishes, &first);
}

SEC("sockops")
int shortcut_join(struct bpf_sock_ops *ctx)
{
	struct wish *now = wish();
	__u32 op = LOAD(ctx->op), own = LOAD(ctx->local_port);
	__u32 other = bpf_ntohl(LOAD(ctx->remote_port));

	if (!now || now->mode == MODE_OFF)
		return 1;
	if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && other == now->port)
		bpf_sock_hash_update(ctx, &dialled, &own, BPF_ANY);
	if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && own == now->port &&
	    now->mode != MODE_MEMBER) {
		bpf_sock_hash_update(ctx, &accepted, &other, BPF_ANY);
		if (now->mode == MODE_BOTH)
			bpf_sock_hash_update(ctx, &accepted_sending, &other, BPF_ANY);
	}
	return 1;
}

SEC("sk_msg")
int shortcut_send(struct sk_msg_md *msg)
{
	struct wish *now = wish();
	__u32 own = LOAD(msg->local_port), other = bpf_ntohl(LOAD(msg->remote_port));
	long verdict;

	if (!now || now->mode == MODE_MEMBER)
		return SK_PASS;
	if (other != now->port)
		verdict = bpf_msg_redirect_hash(msg, &dialled, &other, BPF_F_INGRESS);
	else if (now->mode == MODE_ALTERNATE && now->messages++ % 2)
		return SK_PASS;
	else
		verdict = bpf_msg_redirect_hash(msg, &accepted, &own, BPF_F_INGRESS);
	if (verdict == SK_PASS)
		now->redirected++;
	return SK_PASS; /* nobody there: as without it */
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
