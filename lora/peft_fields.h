/* The fields of adapter_config.json one by one: a field or a value that would change the result in a
 * way that is not served refuses the adapter by name. */
#ifndef MLORA_LORA_PEFT_FIELDS_H
#define MLORA_LORA_PEFT_FIELDS_H

#include <stdbool.h>

#include "engine/base/json.h"

/* Returns OK, EFORMAT or EUNSUPPORTED. `path` is for messages. */
mlora_status peft_fields_check(const json_t *json, const char *path);

/* null, false, "", [] and {}: as if the field were not there. */
bool peft_field_is_off(const json_t *value);

#endif
