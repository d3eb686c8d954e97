//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::{
    Json,
    extract::{Path, State},
};
use serde::Serialize;

use super::{App, error::ApiError};
use crate::prompt::Served;

/// A model, as OpenAI describes one; `max_model_len` is vLLM's addition.
#[derive(Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: usize,
}

/// A list of models.
#[derive(Serialize)]
pub(crate) struct List {
    object: &'static str,
    data: Vec<Model>,
}

impl Model {
    fn of(served: &Served) -> Self {
        Self {
            id: served.name.clone(),
            object: "model",
            created: served.created,
            owned_by: "kvasir",
            max_model_len: served.context_tokens_max,
        }
    }
}

pub(crate) async fn list(State(app): State<App>) -> Json<List> {
    Json(List {
        object: "list",
        data: vec![Model::of(&app.served)],
    })
}

pub(crate) async fn one(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Model>, ApiError> {
    if id == app.served.name {
        Ok(Json(Model::of(&app.served)))
    } else {
        Err(ApiError::no_such_model(&id, &app.served.name))
    }
}
