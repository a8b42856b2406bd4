/** Runs in the audio thread: passes the samples of the microphone to the page. */

class Capture extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) this.port.postMessage(channels[0].slice());
    return true;
  }
}

registerProcessor("capture", Capture);
