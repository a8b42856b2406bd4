/** The microphone as a wav file, and replies as sound. The page's own code only; nothing is loaded from elsewhere. */

const REPLY_RATE = 24000; // samples per second of pcm16 in streams
const START_SECONDS = 0.15; // of sound that waits before the first sample is played, so that playing never runs dry
export const MOST_SECONDS = 120; // of one recording

/** Records the microphone. `start` rejects with a DOMException if the reader or the browser does not allow it. */
export class Recorder {
  async start() {
    this.pieces = [];
    this.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("page/capture.js");
    const capture = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
    capture.port.onmessage = (event) => this.pieces.push(event.data);
    this.context.createMediaStreamSource(this.stream).connect(capture);
  }

  get seconds() {
    const samples = (this.pieces ?? []).reduce((sum, piece) => sum + piece.length, 0);
    return this.context ? samples / this.context.sampleRate : 0;
  }

  /** Release the microphone and return {data: a wav file in base64, seconds}. */
  async stop() {
    const { seconds } = this;
    const rate = this.context.sampleRate;
    for (const track of this.stream.getTracks()) track.stop();
    await this.context.close();
    return { data: toBase64(wavFile(this.pieces, rate)), seconds };
  }
}

/** Plays sound, one piece after another. Only one player is heard: a new one stops the one before. */
export class Player {
  static current = null;

  constructor() {
    Player.current?.stop();
    Player.current = this;
    this.context = new AudioContext();
    this.next = 0;
    this.last = Promise.resolve();
  }

  /** Append samples between -1 and 1. */
  push(samples, rate) {
    if (!this.context || !samples.length) return;
    const buffer = this.context.createBuffer(1, samples.length, rate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    this.next = Math.max(this.next, this.context.currentTime + START_SECONDS);
    source.start(this.next);
    this.next += buffer.duration;
    this.last = new Promise((resolve) => source.addEventListener("ended", resolve));
  }

  stop() {
    this.context?.close();
    this.context = null;
  }
}

/** Play a piece of a reply: base64 of 16-bit samples. */
export function pushPcm(player, data) {
  const bytes = fromBase64(data);
  const values = new Int16Array(bytes.buffer, 0, bytes.length >> 1);
  player.push(Float32Array.from(values, (value) => value / 32768), REPLY_RATE);
}

/** Play a whole wav file in base64. */
export async function playWav(data) {
  const player = new Player();
  const buffer = await player.context.decodeAudioData(fromBase64(data).buffer);
  player.push(buffer.getChannelData(0), buffer.sampleRate);
}

/** The bytes of a wav file with 16-bit samples. */
export function wavFile(pieces, rate) {
  const count = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const ascii = (at, text) => [...text].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  ascii(0, "RIFF");
  view.setUint32(4, 36 + 2 * count, true);
  ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // integers
  view.setUint16(22, 1, true); // one channel
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  ascii(36, "data");
  view.setUint32(40, 2 * count, true);
  let at = 44;
  for (const piece of pieces) {
    for (const sample of piece) {
      view.setInt16(at, Math.round(Math.max(-1, Math.min(1, sample)) * 32767), true);
      at += 2;
    }
  }
  return new Uint8Array(view.buffer);
}

function toBase64(bytes) {
  const parts = [];
  for (let start = 0; start < bytes.length; start += 0x8000) {
    parts.push(String.fromCharCode(...bytes.subarray(start, start + 0x8000)));
  }
  return btoa(parts.join(""));
}

function fromBase64(data) {
  return Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
}
