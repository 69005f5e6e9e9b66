/* From hidden states to what requests get: drawn tokens, log-probabilities, text, events. */
#ifndef MLORA_ENGINE_OUTPUTS_H
#define MLORA_ENGINE_OUTPUTS_H

#include "engine/engine.h"

enum { TOP_MAX = 128 }; /* alternatives to a token */

mlora_status outputs_open(struct mlora_engine *engine, int max_rows); /* OK or ENOMEM */
void outputs_close(struct mlora_engine *engine);                      /* accepts zeroes */

/* After forward() of any model: logits after the batch's sampled tokens, and the tokens drawn from
 * them, left in out->logits and out->ids. */
void outputs_draw(const struct model *model, const struct workspace *workspace, struct batch *batch,
                  const struct outputs *out);

/* After forward(): deliver the log-probabilities of the step's prompt tokens to the requests that
 * asked for them. Returns OK, ENOMEM or EDEVICE. */
mlora_status outputs_score_prompts(struct mlora_engine *engine, const struct plan *plan);

/* Draw a token after each token that is due, on the device; they are on the way to the pass. */
void outputs_sample(struct mlora_engine *engine, const struct plan *plan, struct pass *pass);

/* The pass of this plan has come: give the drawn tokens to their requests, those after wrong guesses
 * left out, tell them, and end those that are done. What was drawn for requests that ended
 * meanwhile is dropped. */
mlora_status outputs_deliver(struct mlora_engine *engine, const struct plan *plan);

/* Send the last event and free the request. */
mlora_status outputs_finish(struct mlora_engine *engine, struct request *request,
                            mlora_finish finish);

#endif
