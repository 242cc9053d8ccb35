// SPDX-License-Identifier: Apache-2.0
//! Other people's programs at both ends.
