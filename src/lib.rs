//! Countersign: a just-in-time credential broker for AI agents.
//!
//! The rooms, from the bottom up: [`core`] is pure; [`failpoint`], [`time`], [`runtime`], [`wire`], [`keys`], [`config`], [`audit`],
//! [`store`], [`connector`], [`policy`] and [`identity`] stand beside one another above it; [`broker`] joins
//! them; [`server`], [`client`] and [`cli`] face the outside. A room imports only rooms below it.

pub mod audit;
pub mod broker;
pub mod cli;
pub mod client;
pub mod config;
pub mod connector;
pub mod core;
pub mod failpoint;
pub mod identity;
pub mod keys;
pub mod mutation;
pub mod policy;
pub mod runtime;
pub mod server;
pub mod store;
pub mod time;
pub mod wire;
