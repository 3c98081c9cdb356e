//! The messages of the SPIFFE Workload API (workload.proto), by hand: no protoc in the build.
//! Field numbers are the standard's; they are held against the `spiffe` crate's and go-spiffe's in the tests.

use std::collections::BTreeMap;

use prost::{Message, Oneof};

/// Every request without parameters.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// `X509SVIDResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct X509SvidResponse {
    /// The SVIDs.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<X509Svid>,
    /// Foreign bundles by trust domain ID, concatenated DER.
    #[prost(btree_map = "string, bytes", tag = "3")]
    pub federated_bundles: BTreeMap<String, Vec<u8>>,
}

/// `X509SVID`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct X509Svid {
    /// The SPIFFE ID.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// The chain, concatenated DER, leaf first.
    #[prost(bytes = "vec", tag = "2")]
    pub x509_svid: Vec<u8>,
    /// PKCS#8.
    #[prost(bytes = "vec", tag = "3")]
    pub x509_svid_key: Vec<u8>,
    /// The trust domain's bundle, concatenated DER.
    #[prost(bytes = "vec", tag = "4")]
    pub bundle: Vec<u8>,
}

/// `X509BundlesResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct X509BundlesResponse {
    /// By trust domain ID, concatenated DER.
    #[prost(btree_map = "string, bytes", tag = "2")]
    pub bundles: BTreeMap<String, Vec<u8>>,
}

/// `JWTSVIDRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct JwtSvidRequest {
    /// For whom.
    #[prost(string, repeated, tag = "1")]
    pub audience: Vec<String>,
    /// One ID alone; empty for all.
    #[prost(string, tag = "2")]
    pub spiffe_id: String,
}

/// `JWTSVIDResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct JwtSvidResponse {
    /// The SVIDs.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<JwtSvid>,
}

/// `JWTSVID`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct JwtSvid {
    /// The SPIFFE ID.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// Compact JWS.
    #[prost(string, tag = "2")]
    pub svid: String,
}

/// `JWTBundlesResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct JwtBundlesResponse {
    /// By trust domain ID, a JWKS.
    #[prost(btree_map = "string, bytes", tag = "1")]
    pub bundles: BTreeMap<String, Vec<u8>>,
}

/// `ValidateJWTSVIDRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ValidateJwtSvidRequest {
    /// Who asks.
    #[prost(string, tag = "1")]
    pub audience: String,
    /// Compact JWS.
    #[prost(string, tag = "2")]
    pub svid: String,
}

/// `ValidateJWTSVIDResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct ValidateJwtSvidResponse {
    /// The SPIFFE ID.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// The claims.
    #[prost(message, optional, tag = "2")]
    pub claims: Option<Struct>,
}

/// `google.protobuf.Struct`.
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    /// The members.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

/// `google.protobuf.ListValue`.
#[derive(Clone, PartialEq, Message)]
pub struct ListValue {
    /// The items.
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<Value>,
}

/// `google.protobuf.Value`.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    /// Which.
    #[prost(oneof = "ValueKind", tags = "1, 2, 3, 4, 5, 6")]
    pub kind: Option<ValueKind>,
}

/// The cases of `google.protobuf.Value`.
#[derive(Clone, PartialEq, Oneof)]
pub enum ValueKind {
    /// `null_value` (an enumeration with the one value 0).
    #[prost(int32, tag = "1")]
    Null(i32),
    /// `number_value`.
    #[prost(double, tag = "2")]
    Number(f64),
    /// `string_value`.
    #[prost(string, tag = "3")]
    Text(String),
    /// `bool_value`.
    #[prost(bool, tag = "4")]
    Bool(bool),
    /// `struct_value`.
    #[prost(message, tag = "5")]
    Struct(Struct),
    /// `list_value`.
    #[prost(message, tag = "6")]
    List(ListValue),
}

impl From<&serde_json::Map<String, serde_json::Value>> for Struct {
    fn from(map: &serde_json::Map<String, serde_json::Value>) -> Self {
        Self { fields: map.iter().map(|(name, value)| (name.clone(), value.into())).collect() }
    }
}

impl From<&serde_json::Value> for Value {
    fn from(value: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        Self {
            kind: Some(match value {
                Json::Null => ValueKind::Null(0),
                Json::Bool(b) => ValueKind::Bool(*b),
                Json::Number(n) => ValueKind::Number(n.as_f64().unwrap_or_default()),
                Json::String(s) => ValueKind::Text(s.clone()),
                Json::Array(items) => ValueKind::List(ListValue { values: items.iter().map(Into::into).collect() }),
                Json::Object(map) => ValueKind::Struct(map.into()),
            }),
        }
    }
}
