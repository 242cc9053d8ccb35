// SPDX-License-Identifier: Apache-2.0
//! Why there may be no ring: one clear line for each cause.

use super::*;

fn open_error(flows_max: u32) -> String {
    let dial = DialOptions::new(&sockets(), None);
    let (headers, splice) = (1, SpliceLimits::default());
    let setup = Setup { buffers: &BUFFERS, dial, flows_max, headers, ring: &RING, splice };
    Ring::open(setup).unwrap_err().to_string()
}

/// What opening says on a thread for which a seccomp filter answers `syscall` with `errno`.
fn error_under_filter(syscall: libc::c_long, errno: i32) -> String {
    thread::spawn(move || {
        forbid(u32::try_from(syscall).unwrap(), errno.cast_unsigned());
        open_error(8)
    })
    .join()
    .unwrap()
}

/// A seccomp filter for this thread: it ends with it.
fn forbid(syscall: u32, errno: u32) {
    let code = |parts: u32| u16::try_from(parts).unwrap();
    let step = |parts, jt, jf, k| libc::sock_filter { code: code(parts), jt, jf, k };
    let mut program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, syscall),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    nix::sys::prctl::set_no_new_privs().unwrap();
    // SAFETY: the kernel copies the program, which lives through the call.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn seccomp_refusal_names_the_filter_and_the_cure() {
    let allow = "allow io_uring_setup, io_uring_enter and io_uring_register in the profile";
    for syscall in [libc::SYS_io_uring_setup, libc::SYS_io_uring_register, libc::SYS_io_uring_enter]
    {
        assert_eq!(
            error_under_filter(syscall, libc::EPERM),
            format!(
                "io_uring is refused here: Operation not permitted (os error 1); a seccomp filter \
                 forbids it (container runtimes do by default: {allow})"
            )
        );
    }
    assert_eq!(
        error_under_filter(libc::SYS_io_uring_setup, libc::ENOSYS),
        format!(
            "io_uring is refused here: Function not implemented (os error 38); the kernel was \
             built without it, or a seccomp filter hides it ({allow})"
        )
    );
}

#[test]
fn kernel_that_knows_no_set_of_flags_is_called_too_old() {
    assert_eq!(
        error_under_filter(libc::SYS_io_uring_setup, libc::EINVAL),
        "io_uring is refused here: Invalid argument (os error 22); the kernel is too old: weir \
         needs Linux 6.7 or newer (`uname -r`)"
    );
}

#[test]
fn lack_of_memory_names_the_limits() {
    assert_eq!(
        error_under_filter(libc::SYS_io_uring_setup, libc::ENOMEM),
        "set up io_uring: out of memory for the queues (raise the cgroup's memory limit or \
         RLIMIT_MEMLOCK, or choose a smaller profile)"
    );
}

#[test]
fn lack_of_descriptors_is_refused_with_the_number() {
    assert_eq!(
        error_under_filter(libc::SYS_io_uring_setup, libc::EMFILE),
        "set up io_uring: no descriptor is left for it (raise RLIMIT_NOFILE with `ulimit -n` or \
         LimitNOFILE=)"
    );
    let (soft, _) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let flows_max = u32::try_from(soft / 2 + 1).unwrap();
    assert_eq!(
        open_error(flows_max),
        format!(
            "a worker with flows_max {flows_max} needs RLIMIT_NOFILE of at least {} (raise it \
             with `ulimit -n` or LimitNOFILE=, or lower limits.flows_max in the profile)",
            flows_max * 2
        )
    );
    assert_eq!(
        open_error(524_289),
        "a worker can hold at most 524288 flows, not 524289: lower limits.flows_max"
    );
}
