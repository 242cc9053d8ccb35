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

/* Longest-prefix key: set and family come first, so that no prefix covers two of them. */
struct network {
	__u32 prefix_bits; /* of what follows: 64 more than the prefix of the address */
	__u32 set;         /* of the two sets of filters */
	__u32 family;      /* 4 or 6 */
	struct address ip; /* IPv4 in the first word */
};

/* What a connect that should be taken meets; see `struct control`. */
enum mode {
	MODE_OPEN,   /* taken; while weir does not beat, it goes on untouched */
	MODE_CLOSED, /* taken; while weir does not beat, it is refused */
	MODE_REFUSE, /* refused: weir takes no more, and nothing may pass it by */
};

/* Written by weir while the programs run, through shared memory: each field in one store. */
struct control {
	__u64 beat_ns; /* when weir last said that it lives, CLOCK_MONOTONIC */
	__u32 mode;    /* enum mode */
	__u32 set;     /* the filters in force, 0 or 1 */
};

/* weir beats ten times a second. One that is silent for so long is dead or stopped. */
#define SILENCE_NS 2000000000LL

/* Index into `losses`. */
enum loss {
	LOSS_RECORDS_FULL, /* no room for a record: weir resets the connection */
	LOSS_RECORD_CLASH, /* the port's last record was never taken: both connections are reset */
	LOSS_STORAGE,      /* no memory to remember the destination: the connect was refused */
	LOSS_OVERRULED,    /* a later program led the connect elsewhere */
	LOSS_PASSED,       /* weir was silent: the connect went on untouched */
	LOSS_REFUSED,      /* weir was silent, or takes no more: the connect was refused */
	LOSS_COUNT,
};

#endif
