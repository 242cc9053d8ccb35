/* SPDX-License-Identifier: Apache-2.0 */
/* What connect.bpf.c and bpf.rs agree on; bpf.rs mirrors every struct with `repr(C)`. */
#ifndef WEIR_SHARED_H
#define WEIR_SHARED_H

/* An address of either family as 16 bytes in network order; IPv4 is kept v4-mapped. */
struct address {
	__u32 word[4];
};

/* The end of a redirected connection that weir sees as its downstream. */
struct record_key {
	struct address ip;
	__u32 port; /* host order */
};

/* Where that connection meant to go. */
struct record {
	struct address ip;
	__u32 port; /* host order */
	__u32 pad;
	__u64 cookie; /* of the socket that made the record: nobody else deletes it */
};

/* Longest-prefix key: the family comes first, so that no prefix covers both. */
struct network {
	__u32 prefix_bits; /* of what follows: 32 more than the prefix of the address */
	__u32 family;      /* 4 or 6 */
	struct address ip; /* IPv4 in the first word */
};

/* Index into `losses`. */
enum loss {
	LOSS_RECORDS_FULL, /* no room for a record: weir resets the connection */
	LOSS_RECORD_CLASH, /* the port's last record was never taken: both connections are reset */
	LOSS_STORAGE,      /* no memory to remember the destination: the connect was refused */
	LOSS_COUNT,
};

#endif
