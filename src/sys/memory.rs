// SPDX-License-Identifier: Apache-2.0
//! Memory: pages that cost nothing until they are touched, pages shared with the kernel, and files
//! without a name.
#![expect(unsafe_code, reason = "mmap(2) gives a raw address")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// A page-aligned mapping; unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

/// A file that holds `text` and goes with its last descriptor (memfd_create(2)).
///
/// # Errors
///
/// `EMFILE`: no descriptor is left.
pub fn text_file(text: &str) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"weir", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    Ok(file.into())
}

impl Mapping {
    /// Maps at least one page, private and zeroed; pages are touched only by use.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: over a memory limit (mmap(2)).
    pub fn new(bytes: usize) -> io::Result<Mapping> {
        Mapping::map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// Maps the beginning of `file`, shared with all who have it.
    ///
    /// # Errors
    ///
    /// The file cannot be mapped, or is shorter (mmap(2)).
    pub fn shared(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Mapping> {
        Mapping::map(bytes, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(bytes: usize, flags: i32, file: i32) -> io::Result<Mapping> {
        let bytes = bytes.max(1);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, file, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { address, bytes })
    }

    /// The first byte.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// How many bytes were asked for.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Never true; here because `len` is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `map` mapped exactly this range, and nobody unmaps it elsewhere.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}
