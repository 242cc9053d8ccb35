/* SPDX-License-Identifier: Apache-2.0 */
/* What sockmap.bpf.c and sockmap.rs agree on; `directions.rs` mirrors the struct with `repr(C)`. */
#ifndef WEIR_SOCKMAP_H
#define WEIR_SOCKMAP_H

/* One direction of a flow that the kernel forwards; all zero when it begins. Only the verdict
 * program writes to it while it runs, but for `passes`. */
struct direction {
	__u64 forwarded;      /* bytes redirected to the target */
	__u64 passed;         /* bytes left to user space, all of them behind those */
	__u64 trimmed;        /* bytes that came twice */
	__u32 next_sequence;  /* of the byte that comes next */
	__u32 first_write;    /* the target's `write_seq` before the first byte */
	__u32 is_begun;       /* `next_sequence` is known */
	__u32 is_broken;      /* a hole, or a segment that could not be trimmed */
	__u32 passes;         /* `enum pass`; weir sets it too; never goes back to 0 */
	__u32 pad[5];
};

/* Why bytes are left to user space. */
enum pass {
	PASS_NOTHING,     /* they are not */
	PASS_ASKED,       /* weir wants them */
	PASS_CREDIT,      /* the peer is behind by more than the credit */
	PASS_ROOM,        /* the target's send buffer is half full */
	PASS_TARGET_GONE, /* the target has been reset or closed */
	PASS_PARTNER,     /* the other direction was left to user space for one of these */
};

/* What TCP may charge to a send buffer on top of a segment's bytes. */
#define SEGMENT_OVERHEAD 4096
/* 4,095 bytes each: the largest segment that the kernel assembles (GRO_MAX_SIZE, 512 KiB). */
#define TRIM_STEPS_MAX 130
/* The target is gone: nothing will be written any more. */
#define BACKLOG_UNKNOWN 0xffffffff

#endif
