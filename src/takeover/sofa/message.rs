// SPDX-License-Identifier: Apache-2.0
//! The messages of SOFARegistry's session servers, as protocol buffers.
//!
//! Field numbers are those of `com.alipay.sofa.registry.common.model.client.pb`; fields that weir
//! neither says nor reads are left out, and what is not known is skipped.

use std::collections::BTreeMap;

use prost::Message;

/// What publishers and subscribers say alike.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BaseRegister {
    #[prost(string, tag = "1")]
    pub(super) instance_id: String,
    #[prost(string, tag = "2")]
    pub(super) zone: String,
    #[prost(string, tag = "3")]
    pub(super) app_name: String,
    #[prost(string, tag = "4")]
    pub(super) data_id: String,
    #[prost(string, tag = "5")]
    pub(super) group: String,
    #[prost(string, tag = "7")]
    pub(super) regist_id: String,
    #[prost(string, tag = "8")]
    pub(super) client_id: String,
    #[prost(string, tag = "12")]
    pub(super) event_type: String,
    #[prost(int64, tag = "13")]
    pub(super) version: i64,
    #[prost(int64, tag = "14")]
    pub(super) timestamp: i64,
}

/// One address with its parameters.
#[derive(Clone, PartialEq, Message)]
pub(super) struct DataBox {
    #[prost(string, tag = "1")]
    pub(super) data: String,
}

/// Those of one zone.
#[derive(Clone, PartialEq, Message)]
pub(super) struct DataBoxes {
    #[prost(message, repeated, tag = "1")]
    pub(super) data: Vec<DataBox>,
}

/// "This lives here", or no longer.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PublisherRegister {
    #[prost(message, repeated, tag = "1")]
    pub(super) data: Vec<DataBox>,
    #[prost(message, optional, tag = "2")]
    pub(super) base: Option<BaseRegister>,
}

/// "Where does this live?", or no longer.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SubscriberRegister {
    #[prost(string, tag = "1")]
    pub(super) scope: String,
    #[prost(message, optional, tag = "2")]
    pub(super) base: Option<BaseRegister>,
}

/// The answer to both.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RegisterResponse {
    #[prost(bool, tag = "1")]
    pub(super) success: bool,
    #[prost(string, tag = "2")]
    pub(super) regist_id: String,
    #[prost(int64, tag = "3")]
    pub(super) version: i64,
    #[prost(bool, tag = "4")]
    pub(super) refused: bool,
    #[prost(string, tag = "5")]
    pub(super) message: String,
}

/// A push: everything that one data center knows of one service.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ReceivedData {
    #[prost(string, tag = "1")]
    pub(super) data_id: String,
    #[prost(string, tag = "2")]
    pub(super) group: String,
    #[prost(string, tag = "3")]
    pub(super) instance_id: String,
    /// The data center.
    #[prost(string, tag = "4")]
    pub(super) segment: String,
    /// By zone.
    #[prost(btree_map = "string, message", tag = "7")]
    pub(super) data: BTreeMap<String, DataBoxes>,
    #[prost(int64, tag = "8")]
    pub(super) version: i64,
    /// How `body` is compressed; empty, because nobody asked for that.
    #[prost(string, tag = "10")]
    pub(super) encoding: String,
}

/// The answer to a push.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Acknowledgement {
    #[prost(bool, tag = "1")]
    pub(super) success: bool,
    #[prost(string, tag = "2")]
    pub(super) message: String,
}
