//! The store over real sockets, with the real client and with others.

mod bad_input;
mod bulk;
mod bulk_decode;
mod hostile;
mod indexes;
mod life;
mod local;
mod puts;
mod retrieval;
mod retrieval_options;
mod round_trip;
mod support;
