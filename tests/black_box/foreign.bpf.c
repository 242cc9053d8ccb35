// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* Somebody else's connect hook: leads IPv4 connects for one place to another one. */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 from_ip = 0, from_port = 0, to_ip = 0, to_port = 0; /* host order */

SEC("cgroup/connect4")
int foreign_connect(struct bpf_sock_addr *ctx)
{
	if (ctx->user_ip4 == bpf_htonl(from_ip) && ctx->user_port == bpf_htons((__u16)from_port)) {
		ctx->user_ip4 = bpf_htonl(to_ip);
		ctx->user_port = bpf_htons((__u16)to_port);
	}
	return 1;
}

char LICENSE[] SEC("license") = "GPL";
