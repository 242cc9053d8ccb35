// SPDX-License-Identifier: Apache-2.0
//! The ring against the real kernel, over loopback.
