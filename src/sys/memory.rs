// SPDX-License-Identifier: Apache-2.0
//! Anonymous memory that costs nothing until it is touched.
#![expect(unsafe_code, reason = "mmap(2) gives a raw address")]

use std::io;
use std::ptr::NonNull;

/// A private, zeroed, page-aligned mapping; unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    /// Maps at least one page; pages are touched only by use.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: over a memory limit (mmap(2)).
    pub fn new(bytes: usize) -> io::Result<Mapping> {
        let bytes = bytes.max(1);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
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
        // SAFETY: `new` mapped exactly this range, and nobody unmaps it elsewhere.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}
